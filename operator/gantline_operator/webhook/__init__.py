"""What the operator says at admission: warnings, and never a refusal."""
