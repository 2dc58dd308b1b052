"""Complete one prompt on the terminal: the answer streams as it is made.

Where the model has a chat template the prompt is a user's message; with --raw, or without a template, it is a text to continue.
`-` reads the prompt from standard input. The answer goes to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gantline_runtime import logs
from gantline_runtime.chat_template import ChatTemplate, TemplateError
from gantline_runtime.commands.display import LoadingDisplay
from gantline_runtime.config import EngineConfig, from_arguments
from gantline_runtime.config import add_arguments as add_config_arguments
from gantline_runtime.engine_process import Engine
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.server.output import ChoiceOutput
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] DIR PROMPT"
    parser.add_argument("model_dir", metavar="DIR", type=Path, help="folder with config.json, *.safetensors and tokenizer.json")
    parser.add_argument("prompt", metavar="PROMPT", help="what to answer or continue; - reads standard input")
    group = parser.add_argument_group("answer")
    group.add_argument("--raw", action="store_true", help="continue PROMPT as a text, without the model's chat template")
    group.add_argument("--system", default="", help="a system message before the prompt")
    group.add_argument("--max-tokens", type=int, default=512, help="most tokens to generate (default: 512)")
    group.add_argument("--temperature", type=float, help="0: always the likeliest token (default: the model's, else 1)")
    group.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens that make up this share (default: the model's, else 1)"
    )
    group.add_argument("--top-k", type=int, help="sample from this many likeliest tokens; 0: all (default: the model's, else 0)")
    group.add_argument("--seed", type=int, help="the same seed gives the same answer")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add_config_arguments(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Raises GantlineError if the model cannot be loaded or the prompt does not fit."""
    _check(args)
    config = from_arguments(EngineConfig, args)
    logs.configure("warning", "text")
    tokenizer, defaults = Tokenizer.load(args.model_dir), GenerationDefaults.load(args.model_dir)
    prompt_ids = _encode(args, tokenizer)
    from gantline_runtime.engine import LLMEngine  # torch takes seconds to import; bad input is refused before

    with LoadingDisplay() as display:
        engine = LLMEngine(args.model_dir, config, on_progress=display.show)
    try:
        _check_length(len(prompt_ids), engine.session_len)
        _stream(engine, tokenizer, prompt_ids, _sampling(args, defaults), args.stop)
    finally:
        engine.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    checks = (
        ("max_tokens", args.max_tokens, args.max_tokens >= 1, "1 or more"),
        ("temperature", args.temperature, args.temperature is None or 0 <= args.temperature <= 2, "a number from 0 to 2"),
        ("top_p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "a number above 0, at most 1"),
        ("top_k", args.top_k, args.top_k is None or args.top_k >= 0, "0 or more"),
        ("stop", args.stop, all(args.stop), "texts that are not empty"),
    )
    for name, value, ok, expected in checks:
        if not ok:
            raise ConfigurationError(f"{name} is {value!r}, which is not allowed", cure=f"Give {expected}.")


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


def _check_length(prompt_len: int, session_len: int) -> None:
    if not 0 < prompt_len < session_len:
        cause = f"the prompt has {prompt_len} tokens; the model's context holds {session_len}, with at least one to generate"
        raise ConfigurationError(cause, cure="Shorten the prompt, or raise --session-len if the model allows it.")


def _sampling(args: argparse.Namespace, defaults: GenerationDefaults) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=args.max_tokens,
        temperature=defaults.temperature if args.temperature is None else args.temperature,
        top_p=defaults.top_p if args.top_p is None else args.top_p,
        top_k=defaults.top_k if args.top_k is None else args.top_k,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
        seed=args.seed,
    )


def _stream(engine: Engine, tokenizer: Tokenizer, prompt_ids: list[int], sampling: SamplingParams, stop: list[str]) -> None:
    output = ChoiceOutput(tokenizer, prompt_ids, stop=stop, stop_ids=frozenset(engine.eos_token_ids))
    engine.add_request(EngineRequest(request_id="generate", prompt_ids=prompt_ids, sampling=sampling))
    began = time.monotonic()
    while output.finish_reason is None:
        sys.stdout.write(output.feed(engine.step()).text)
        sys.stdout.flush()
    seconds = time.monotonic() - began
    print(flush=True)
    summary = f"{output.num_tokens} tokens in {seconds:.1f} s ({output.num_tokens / seconds:.1f} a second), ended by {output.finish_reason}"
    print(f"[{len(prompt_ids)} prompt tokens; {summary}]", file=sys.stderr)
