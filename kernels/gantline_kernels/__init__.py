"""GPU kernels and their plain references."""
