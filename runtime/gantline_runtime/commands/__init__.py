"""Subcommands of `gantline`, one module each: `add_arguments(parser)` and `run(args) -> int`. The table is in `cli.py`."""
