"""Make an API key for `gantline serve --api-keys FILE`.

The key goes to stdout, for whoever is to use it, and is kept nowhere; the line for the file goes to stderr, or to the end of FILE.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.api_keys import make_key
from gantline_runtime.server.key_lines import describe_key

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose it is; logs show it")
    parser.add_argument("--append", metavar="FILE", type=Path, help="add the line to this file, which is made if it is not there")


def run(args: argparse.Namespace) -> int:
    key = make_key()
    line = describe_key(args.name, key)
    if args.append is None:
        print(f"Add this line to the file of --api-keys:\n{line}", file=sys.stderr)
    else:
        try:
            with open(os.open(args.append, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            cause = f"{args.append} cannot be written: {error.strerror or error}"
            raise ConfigurationError(cause, cure="Give a file in a folder that you may write to.") from None
    print(key)
    return 0
