"""The data plane: engine, models, OpenAI server and the `gantline` command line."""
