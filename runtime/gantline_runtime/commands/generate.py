"""Complete one prompt on the terminal: the answer streams as it is made.

Where the model has a chat template the prompt is a user's message; with --raw, or without a template, it is a text to continue.
`-` reads the prompt from standard input. The answer goes to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gantline_runtime import logs
from gantline_runtime.chat_template import ChatTemplate, TemplateError
from gantline_runtime.commands.answer_options import add_answer_arguments, generation_of
from gantline_runtime.config import EngineConfig, from_arguments
from gantline_runtime.config import add_arguments as add_config_arguments
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gantline_runtime.offline import Response

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] DIR PROMPT"
    parser.add_argument("model_dir", metavar="DIR", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    parser.add_argument("prompt", metavar="PROMPT", help="what to answer or continue; - reads standard input")
    parser.add_argument("--raw", action="store_true", help="continue PROMPT as a text, without the model's chat template")
    add_answer_arguments(parser)
    add_config_arguments(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Raises GantlineError if the model cannot be loaded or the prompt does not fit."""
    config, generation = from_arguments(EngineConfig, args), generation_of(args)
    logs.configure("warning", "text")
    prompt_ids = _encode(args, Tokenizer.load(args.model_dir))
    from gantline_runtime.offline import pipeline  # torch takes seconds to import; bad input is refused before

    with pipeline(args.model_dir, config) as pipe:
        _stream(pipe.stream_infer(prompt_ids, generation))
    return 0


def _encode(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    text = _prompt(args.prompt)
    if args.raw or tokenizer.chat_template is None:
        if args.system:
            raise ConfigurationError("--system needs a chat template", cure="Leave out --system, or --raw.")
        return tokenizer.encode(text)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    try:
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
        rendered = template.render([*messages, {"role": "user", "content": text}])
    except TemplateError as error:
        raise CheckpointError(str(error), cure="Give --raw to do without it.") from None
    return tokenizer.encode(rendered, add_special_tokens=False)


def _prompt(argument: str) -> str:
    text = sys.stdin.read() if argument == "-" else argument
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError("the prompt is not UTF-8", cure="Convert it to UTF-8.") from None
    return text


def _stream(parts: Iterator[Response]) -> None:
    began = time.monotonic()
    for part in parts:
        sys.stdout.write(part.text)
        sys.stdout.flush()
    seconds = time.monotonic() - began
    print(flush=True)
    count = part.generate_token_len
    summary = f"{count} tokens in {seconds:.1f} s ({count / seconds:.1f} a second), ended by {part.finish_reason}"
    print(f"[{part.input_token_len} prompt tokens; {summary}]", file=sys.stderr)
