"""Block sizes, warps and pipeline depths of Triton's attention kernels, all timed in one call: `python -m benchmarks.tune_attention`.

`--parts` times into how many parts a context is best split instead. Variants are compiled first, by several processes at once, into
Triton's cache; then timed one after the other. The best of each goes into the kernel's own choice, by hand, with a line in
docs/perf-log.md.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import torch
from gantline_kernels.triton_kernels.decode import DecodePlan, decode_attention
from gantline_kernels.triton_kernels.prefill import prefill_attention

from benchmarks.kernels import DIM, Case, paged_inputs

Variant = tuple[str, dict[str, Any]]


def decode_variants() -> list[Variant]:
    shapes = itertools.product((32, 64), (2, 4), (2, 3, 4))
    return [("decode", {"tile": t, "num_warps": w, "num_stages": s}) for t, w, s in shapes]


def prefill_variants() -> list[Variant]:
    chosen = [
        {"rows": rows, "tile": tile, "num_warps": warps, "num_stages": stages, "tma": tma}
        for rows, tile, warps, stages, tma in itertools.product((64, 128), (64, 128), (4, 8), (2, 3), (False, True))
        if not (rows == 64 and warps == 8) and not (tile == 128 and stages == 3 and rows == 64)
    ]
    return [("prefill", options) for options in chosen]


def _call(kind: str, options: dict[str, Any], queries: list[int], contexts: list[int], parts: int = 0) -> Callable[[], None]:
    q, keys, values, tables, starts, lens = paged_inputs(queries, contexts, block_size=max(64, options["tile"]))
    out = torch.empty_like(q)
    if kind == "decode":
        plan = DecodePlan(parts, least=1, joined=parts > 1) if parts else None
        return lambda: decode_attention(q, keys, values, tables, lens, out, DIM**-0.5, max(contexts), 0, 0.0, plan=plan, **options)
    return lambda: prefill_attention(q, keys, values, tables, starts, lens, out, DIM**-0.5, max(contexts), 0, 0, 0.0, **options)


def compile_variant(variant: Variant) -> str:
    kind, options = variant
    try:
        for parts in (1, 3, 16) if kind == "decode" else (0,):
            _call(kind, options, [1] * 16 if kind == "decode" else [256] * 2, [512] * 16 if kind == "decode" else [512] * 2, parts)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def _time(kind: str, options: dict[str, Any], name: str, queries: list[int], contexts: list[int], parts: int = 0) -> None:
    pairs = sum(q * (c - q) + q * (q + 1) / 2 for q, c in zip(queries, contexts, strict=True))
    run = _call(kind, options, queries, contexts, parts)
    if kind == "decode":
        case = Case(name, lambda _: run, read=4.0 * sum(contexts) * 8 * DIM)
    else:
        case = Case(name, lambda _: run, operations=4.0 * pairs * 32 * DIM)
    print(json.dumps(case.report() | options | ({"parts": parts} if parts else {})), flush=True)


def time_parts() -> None:
    for batch, context in ((1, 1024), (1, 32768), (16, 512), (16, 1024), (16, 8192), (64, 1024), (256, 1024)):
        for parts in (1, 2, 4, 8, 16, 32, 64):
            for stages in (3, 5, 7):
                if parts * 64 <= context and 64 <= parts * batch * 8 <= 4096:
                    options = {"tile": 64, "num_warps": 2, "num_stages": stages}
                    _time("decode", options, f"{batch} x {context}", [1] * batch, [context] * batch, parts)


def main() -> int:
    if "--parts" in sys.argv:
        time_parts()
        return 0
    variants = decode_variants() + prefill_variants()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        failures = pool.map(compile_variant, variants, chunksize=1)
    for (kind, options), failure in zip(variants, failures, strict=True):
        if failure:
            print(json.dumps({"variant": kind, **options, "error": failure}), flush=True)
        elif kind == "decode":
            _time(kind, options, "256 x 1k", [1] * 256, [1024] * 256, 1)
            _time(kind, options, "16 x 8k", [1] * 16, [8192] * 16, 8)
        else:
            _time(kind, options, "8 x 4096", [4096] * 8, [4096] * 8)
            _time(kind, options, "2k on 30k", [2048], [32768])
    return 0


if __name__ == "__main__":
    sys.exit(main())
