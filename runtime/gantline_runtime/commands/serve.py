"""Serve a model over HTTP, as OpenAI clients expect it.

The port listens from the start: /health tells how loading goes, /ready turns 200 when requests are welcome. SIGTERM drains: running
streams finish within --drain-timeout, then the process ends with exit code 0.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gantline_runtime import logs
from gantline_runtime.config import EngineConfig, ServerConfig, from_arguments
from gantline_runtime.config import add_arguments as add_config_arguments
from gantline_runtime.engine_launch import launch_engine

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] DIR"
    parser.add_argument("model_dir", metavar="DIR", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    add_config_arguments(parser, ServerConfig)
    add_config_arguments(parser, EngineConfig)


def run(args: argparse.Namespace, *, engine: str | None = None) -> int:
    """Serve until told to stop; `engine` (`module:class`) is for tests. Raises GantlineError if the model cannot be served."""
    engine_config, config = from_arguments(EngineConfig, args), from_arguments(ServerConfig, args)
    logs.configure(config.log_level, config.log_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one prompt at a time and a thread each; the rest belongs to the engine
    log_format = logs.resolve_format(config.log_format)
    launched = launch_engine(args.model_dir, engine_config, log_level=config.log_level, log_format=log_format, engine=engine)
    try:
        from gantline_runtime.commands.serving import serve  # the engine is waited for, so its process comes before all else

        return serve(args.model_dir, engine_config, config, launched)
    finally:
        launched.discard()
