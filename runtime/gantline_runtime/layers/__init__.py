"""What models are made of. A layer owns its weights (already this rank's part), says where they come from in a checkpoint
(`targets`), and calls the kernels' operations."""
