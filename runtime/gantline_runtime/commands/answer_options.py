"""The flags of commands that answer on the terminal: how tokens are chosen and where an answer ends."""

from __future__ import annotations

import argparse

from gantline_runtime.generation_config import GenerationConfig

__all__ = ["add_answer_arguments", "generation_of"]


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument("--system", default="", help="a system message before all else")
    group.add_argument("--max-tokens", "--max-new-tokens", type=int, default=512, help="most tokens to generate (default: 512)")
    group.add_argument("--temperature", type=float, help="0: always the likeliest token (default: the model's, else 1)")
    group.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens that make up this share (default: the model's, else 1)"
    )
    group.add_argument("--top-k", type=int, help="sample from this many likeliest tokens; 0: all (default: the model's, else 0)")
    group.add_argument("--seed", type=int, help="the same seed gives the same answer")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")


def generation_of(args: argparse.Namespace) -> GenerationConfig:
    """Raises ConfigurationError for a value out of range."""
    return GenerationConfig(
        max_new_tokens=args.max_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        random_seed=args.seed,
        stop_words=tuple(args.stop),
    )
