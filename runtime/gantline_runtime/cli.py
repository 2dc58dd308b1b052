"""The `gantline` command: a table of subcommands, each in a module of its own that is imported only when it is asked for.

A module of the table has `add_arguments(parser)`, which gives an `argparse` parser its flags, and `run(args) -> int`, the exit code; the
first paragraph of its docstring opens `--help`. Errors become one line of cause and cure on stderr, a termination message for Kubernetes,
and the exit code of their reason (`termination.exit_code`): 64-67 for what cannot succeed unless something is changed, 70-77 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from gantline_runtime import termination
from gantline_runtime.errors import ConfigurationError, GantlineError
from gantline_runtime.failures import describe_exception
from gantline_runtime.foreign_flags import cure_of_foreign

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("gantline_runtime.commands.serve", "serve a model over HTTP, as OpenAI clients expect it"),
    "generate": ("gantline_runtime.commands.generate", "complete one prompt on the terminal"),
    "chat": ("gantline_runtime.commands.chat", "talk with a model on the terminal"),
    "inspect": ("gantline_runtime.commands.inspect", "what a model is, without loading it"),
    "fetch": ("gantline_runtime.commands.fetch", "download a model, resumable"),
    "quantize": ("gantline_quant.command", "make a smaller checkpoint of a model"),
    "verify": ("gantline_runtime.commands.verify", "compare a fetched or quantized model with the hashes it was published with"),
    "evict": ("gantline_runtime.commands.evict", "remove fetched and quantized models from a cache volume, by name"),
    "plan": ("gantline_operator.plan_command", "what the operator would decide for a service and a cluster"),
    "api-key": ("gantline_runtime.commands.api_key", "make an API key for serve"),
    "prebuild-kernels": ("gantline_runtime.commands.prebuild_kernels", "compile Triton's kernels beforehand, without a GPU"),
    "check-env": ("gantline_runtime.commands.check_env", "versions, devices, what works here and what is missing"),
}
"""Name -> (module, one line for `gantline --help`). Modules are named, not imported: the runtime imports neither quant nor operator."""

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`| head`). Python would complain again while flushing at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(error)


def _dispatch(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("", "-h", "--help", "help"):
        print(_overview())
        return 0 if name else termination.exit_code(termination.Reason.INVALID_CONFIGURATION)
    if name in ("-V", "--version", "version"):
        print(f"gantline {version()}")
        return 0
    if name not in COMMANDS:
        raise ConfigurationError(f"unknown command {name!r}", cure=f"Known commands: {', '.join(COMMANDS)}.")
    module = _load(name)
    parser = _Parser(
        prog=f"gantline {name}",
        description=_first_paragraph(module.__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(rest)))


def _load(name: str) -> argparse.Namespace:
    path = COMMANDS[name][0]
    try:
        return importlib.import_module(path)  # type: ignore[return-value]
    except ModuleNotFoundError as error:
        if error.name and not path.startswith(error.name) and not error.name.startswith("gantline"):
            extra = "operator" if path.startswith("gantline_operator") else "runtime"
            cure = f"Install it with: pip install 'gantline[{extra}]'."
            raise ConfigurationError(f"`gantline {name}` needs the package {error.name}, which is not installed", cure=cure) from error
        raise


def _report(error: Exception) -> int:
    message = describe_exception(error)
    if isinstance(error, GantlineError):
        print(f"gantline: {_sentence(message.message)} {message.cure}".rstrip(), file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"gantline: {_sentence(message.message.splitlines()[0])} {message.cure}".rstrip(), file=sys.stderr)
    termination.write(message)
    return termination.exit_code(message.reason)


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("gantline")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0+unknown"


class _Parser(argparse.ArgumentParser):
    """A bad flag is a ConfigurationError like any other, so that a pod's termination message names it."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2]
        raise ConfigurationError(message, cure=cure_of_foreign(unknown) or f"See `{self.prog} --help`.")


def _overview() -> str:
    lines = ["usage: gantline COMMAND ...", "", "Serve large language models, on one machine or on Kubernetes.", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([*lines, "", "`gantline COMMAND --help` shows a command's options."])


def _first_paragraph(text: str | None) -> str:
    return (text or "").strip().split("\n\n")[0]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."


if __name__ == "__main__":
    sys.exit(main())
