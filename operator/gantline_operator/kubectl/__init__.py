"""`kubectl gantline`: what a person asks about services, with that person's own rights and nothing else."""
