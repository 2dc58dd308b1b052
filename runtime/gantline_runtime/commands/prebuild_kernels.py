"""Compile the Triton kernels of models beforehand; no GPU is needed, and none is used.

A server started with $GANTLINE_TRITON_KERNELS naming the folder launches them without compiling; the `runtime` image carries such a folder.
Kernels are found by types and sizes, never by weights, so a fine-tuned model is served by those of the model it was made from. With --check
nothing is made: it says which kernels of a model the folder in use lacks, as a server would find them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

from gantline_runtime.prebuilt_models import MODELS, ModelVariant, read_variants, select_variants

__all__ = ["add_arguments", "run"]

_TARGETS = (80, 86, 89, 90)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="folder for the kernels; what is in it is kept")
    what.add_argument(
        "--check", action="store_true", help="compile nothing; say what $GANTLINE_TRITON_KERNELS lacks, exit code 1 if anything"
    )
    kept = "folder of a cache: kernels that an earlier run left there are not compiled again"
    parser.add_argument("--reuse", type=Path, metavar="DIR", help=kept)
    parser.add_argument(
        "--targets", type=int, nargs="+", default=_TARGETS, metavar="N", help="GPU architectures, 90 for 9.0 (default: 80 86 89 90)"
    )
    names = ", ".join(MODELS)
    parser.add_argument("--models", nargs="*", metavar="NAME", help=f"models of the list, all if none is named (default): {names}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a model's config.json, or its folder, instead of the list's models")
    parser.add_argument("--tp", type=int, nargs="+", default=(1,), metavar="N", help="tensor parallelism that --config is served with")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes that compile (default: as many as processors)")


def run(args: argparse.Namespace) -> int:
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # else torch would ask this machine's GPUs for those that are not there
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from gantline_runtime.memory import available_cpus
    from gantline_runtime.prebuild import look_up, prebuild

    variants = list(select_variants(args.models or ()) if args.config is None else read_variants(args.config, args.tp))
    if args.check:
        return _report(look_up(variants, args.targets))
    began = time.monotonic()
    prebuild(variants, args.targets, args.out, jobs=args.jobs or available_cpus(), reuse=args.reuse, on_done=_say)
    kernels = list(args.out.glob("*/*.cubin"))
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{len(kernels)} kernels in {args.out}, {size / 1e6:.1f} MB, after {time.monotonic() - began:.0f} s")
    return 0


def _report(lacking: dict[str, list[str]]) -> int:
    for variant, names in lacking.items():
        print(f"{variant}: lacks {len(names)}: {', '.join(sorted(set(names)))}" if names else f"{variant}: nothing is lacking")
    return 1 if any(lacking.values()) else 0


def _say(variant: ModelVariant, target: int, done: int, total: int) -> None:
    print(f"{done}/{total} {variant.name}, tp {variant.tp}, architecture {target}", file=sys.stderr, flush=True)
