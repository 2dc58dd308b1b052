"""Block sizes, warps and pipeline depths of Triton's attention kernels, all timed in one call: `python -m benchmarks.tune_attention`.

`--parts` times into how many parts a context is best split instead, `--shared` the pass over shared prefixes and where it pays, `--chunks`
the kernels for chunks of prompts, Triton's and CUDA C++. Variants are compiled first, by several processes at once, into Triton's cache;
then timed one after the other. The best of each goes into the kernel's own choice, by hand, with a line in docs/perf-log.md.
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
from gantline_kernels.triton_kernels.shared_prefix import attend_shared_prefixes

from benchmarks.kernels import DIM, HEADS, KV_HEADS, Case, paged_inputs, prefill_cases, shared_inputs

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
    return lambda: prefill_attention(q, keys, values, tables, starts, lens, out, DIM**-0.5, 0, 0, 0.0, **options)


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


SHARED_SHAPES = {"256 x 2048": [(256, 2048)], "64 x 2048": [(64, 2048)], "8 x 8192": [(8, 8192)], "2 x 32k": [(2, 32768)]}


def shared_variants() -> list[dict[str, Any]]:
    """Of the pass over the shared prefixes alone."""
    return [
        {"rows": rows, "tile": tile, "num_warps": warps, "num_stages": stages, "tma": tma}
        for rows, tile, warps, stages, tma in itertools.product((16, 32, 64, 128), (32, 64), (4, 8), (2, 3), (False, True))
        if (warps == 4 or rows == 128) and (tile == 64 or rows <= 32)
    ]


def shared_pass(groups: list[tuple[int, int]], options: dict[str, Any], parts: int) -> Callable[[], None]:
    (q, keys, values, tables, _, _), shared = shared_inputs(groups, 64)
    part_out = torch.empty((len(q), HEADS, parts, DIM), dtype=torch.float32, device="cuda")
    part_lse = torch.empty((len(q), HEADS, parts), dtype=torch.float32, device="cuda")
    return lambda: attend_shared_prefixes(q, keys, values, tables, shared, part_out, part_lse, DIM**-0.5, 0.0, parts=parts, **options)


def compile_shared(options: dict[str, Any]) -> str:
    try:
        for parts in (1, 3, 16):
            shared_pass([(8, 256)], options, parts)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def time_shared() -> None:
    """The best three variants of the pass for each shape; then the whole, by parts, against reading each context by itself."""
    variants = shared_variants()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        failures = pool.map(compile_shared, variants, chunksize=1)
    print("failed:", [(v, f) for v, f in zip(variants, failures, strict=True) if f], flush=True)
    usable = [v for v, f in zip(variants, failures, strict=True) if not f]
    for name, groups in SHARED_SHAPES.items():
        rows = groups[0][0] * HEADS // KV_HEADS
        timed = []
        for options in usable:
            if options["rows"] > max(16, rows) or options["rows"] < min(32, rows):
                continue
            programs = -(-rows // options["rows"]) * KV_HEADS
            for per_chip in (1, 2):
                parts = max(1, min(132 * per_chip // programs, groups[0][1] // 128, 64))
                run = shared_pass(groups, options, parts)
                timed.append((Case(name, lambda _, run=run: run).time_us(), parts, *options.values()))
        print(name, "us, parts, rows, tile, warps, stages, tma:", *sorted(timed)[:4], flush=True)


def time_whole() -> None:
    """Decode attention of sequences that share, as one and each by itself, by sharers and prefix; all with 256 tokens of their own."""
    for sharers, prefix in itertools.product((2, 4, 8, 16, 64, 256), (64, 256, 1024, 2048, 8192)):
        if sharers * prefix > 1 << 20:
            continue
        for alone in (0, 64):
            inputs, shared = shared_inputs([(sharers, prefix)] + ([(alone, 0)] if alone else []), 256)
            q, keys, values, tables, _, lens = inputs
            times = []
            for told in (None, shared):
                out = torch.empty_like(q)

                def run(told: Any = told, out: torch.Tensor = out) -> None:
                    decode_attention(q, keys, values, tables, lens, out, DIM**-0.5, prefix + 256, 0, 0.0, told)  # noqa: B023

                times.append(Case("", lambda _, run=run: run).time_us())
            print(f"{sharers} x ({prefix} + 256), {alone} alone: {times[0]:.1f} -> {times[1]:.1f} us", flush=True)


def time_plans() -> None:
    """256 x (2048 + 256), by rows and parts of the prefix, taken in or joined."""
    inputs, shared = shared_inputs([(256, 2048)], 256)
    q, keys, values, tables, _, lens = inputs
    out = torch.empty_like(q)
    for rows, parts, joined in itertools.product((64, 128), (1, 2, 3, 4), (False, True)):
        plan = DecodePlan(1, 2048, rows, parts, joined)

        def run(plan: DecodePlan = plan) -> None:
            decode_attention(q, keys, values, tables, lens, out, DIM**-0.5, 2304, 0, 0.0, shared, plan=plan)

        us = Case("", lambda _, run=run: run).time_us()
        print(f"256 x (2048 + 256): rows {rows} parts {parts} joined {joined}: {us:.1f} us", flush=True)


def time_chunks() -> None:
    """Triton's kernel for chunks of prompts against that in CUDA C++."""
    for cases in zip(prefill_cases("triton"), prefill_cases("cuda"), strict=True):
        times = [case.time_us() for case in cases]
        print(f"{cases[0].name}: floor {cases[0].floor_us:.0f}, triton {times[0]:.1f}, cuda {times[1]:.1f} us", flush=True)
        torch.cuda.empty_cache()


def main() -> int:
    modes = {"--parts": [time_parts], "--shared": [time_shared, time_plans, time_whole], "--chunks": [time_chunks]}
    for mode, runs in modes.items():
        if mode in sys.argv:
            for run in runs:
                run()
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
