"""`python -m gantline_devcluster`: build the parts, run a real one-node cluster, simulate nodes beside it."""

from __future__ import annotations

import argparse
import sys

from gantline_devcluster.binaries import SETS, collected
from gantline_devcluster.build import build
from gantline_devcluster.errors import DevclusterError


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except DevclusterError as error:
        print(f"gantline: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("gantline: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m gantline_devcluster", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_build(commands.add_parser("build", help="compile Kubernetes and its parts into the cache (once for each version)"))
    where = commands.add_parser("binaries", help="print the folder with the built binaries (kubectl, helm, ...)")
    where.set_defaults(run=lambda _: print(collected()))
    return top


def add_build(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        choices=sorted(SETS),
        default="all",
        help="which binaries: client (kubectl, helm), api (no node), test (api and kwok), node, all (default)",
    )
    command.set_defaults(run=lambda options: print(build(SETS[options.set], lambda line: print(line, file=sys.stderr, flush=True))))
