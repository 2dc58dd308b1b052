"""Talk with a model on the terminal: a turn a line, the answers stream as they are made.

/reset forgets the conversation, /system TEXT does so and sets a system message, /exit (or end of input) ends. Ctrl-C stops an answer.
Answers go to stdout, all else to stderr, so input and output may be files.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gantline_runtime import logs
from gantline_runtime.commands.answer_options import add_answer_arguments, generation_of
from gantline_runtime.config import EngineConfig, from_arguments
from gantline_runtime.config import add_arguments as add_config_arguments
from gantline_runtime.errors import CheckpointError, GantlineError
from gantline_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gantline_runtime.offline import Pipeline, Session

__all__ = ["add_arguments", "run"]

_HELP = "/reset forgets the conversation, /system TEXT sets a system message, /exit ends; Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] DIR"
    parser.add_argument("model_dir", metavar="DIR", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    add_answer_arguments(parser)
    add_config_arguments(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Raises GantlineError if the model cannot be loaded, or has no chat template."""
    config, generation = from_arguments(EngineConfig, args), generation_of(args)
    logs.configure("warning", "text")
    if Tokenizer.load(args.model_dir).chat_template is None:
        raise CheckpointError("the model has no chat template", cure="Use gantline generate --raw, which continues a text.")
    from gantline_runtime.offline import pipeline  # torch takes seconds to import; bad input is refused before

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history, where Python has it)
    with pipeline(args.model_dir, config) as pipe:
        _say(f"{args.model_dir.name} is ready. {_HELP}")
        _converse(pipe, pipe.session(generation, system=args.system))
    return 0


def _converse(pipe: Pipeline, session: Session) -> None:
    config = session.gen_config
    while True:
        try:
            line = _read().strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            session = pipe.session(config, system=rest.strip())
            _say("The conversation begins anew.")
        elif command.startswith("/"):
            _say(f"There is no command {command}. {_HELP}")
        elif line:
            _answer(session, line)


def _read() -> str:
    if sys.stdin.isatty():
        return input("> ")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _answer(session: Session, line: str) -> None:
    try:
        for part in session.stream(line):
            sys.stdout.write(part.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        _say("\nStopped; this turn is forgotten.")
    except GantlineError as error:
        _say(f"{error}. {error.cure}")
    print(flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
