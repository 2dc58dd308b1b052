"""Attention over shared prefixes, by variant and by where it pays: `python -m benchmarks.tune_shared [--warm] [pass] [plan] ...`.

    pass   the pass over the prefixes alone: rows of a tile, tokens of a tile, warps, stages, copy engine, parts
    plan   the whole: parts of the prefix, taken in by the program of a sequence's own context or joined afterwards, both launches at
           once or one after the other; tiles, warps and stages of the sequences' own parts
    whole  sequences that share against each by itself, by their number and the prefix's length; and how far the results are apart
    split  decode attention of few sequences that share nothing: parts, stages, warps
    chunk  kernels for chunks of prompts: Triton's and CUDA C++

`--warm` runs every job once, by several processes at once, which leaves its kernels in Triton's cache; without it they are timed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from gantline_kernels.triton_kernels.decode import DecodePlan, decode_attention
from gantline_kernels.triton_kernels.shared_prefix import attend_shared_prefixes

from benchmarks import ceilings
from benchmarks.kernels import DIM, HEADS, KV_HEADS, Case, paged_inputs, prefill_cases, shared_inputs

Job = tuple[Any, ...]
Groups = tuple[tuple[int, int], ...]
_SMS = 132
_SHAPES: list[Groups] = [((256, 2048),), ((64, 2048),), ((8, 8192),), ((2, 32768),)]
_OWN = 256
_SCALE = DIM**-0.5


@lru_cache(maxsize=1)
def _inputs(groups: Groups) -> Any:
    return shared_inputs(list(groups), _OWN)


def pass_jobs() -> Iterator[Job]:
    for groups in _SHAPES:
        rows_of_all, prefix = groups[0][0] * HEADS // KV_HEADS, groups[0][1]
        variants = itertools.product((16, 32, 64, 128), (32, 64), (4, 8), (2, 3), (False, True))
        for rows, tile, warps, stages, tma in variants:
            fits = min(32, rows_of_all) <= rows <= max(16, rows_of_all)
            if fits and (warps == 4 or rows == 128) and (tile == 64 or rows <= 32) and (tma or stages == 2):
                programs = -(-rows_of_all // rows) * KV_HEADS
                for per_chip in (1, 2):
                    parts = max(1, min(_SMS * per_chip // programs, prefix // 128, 64))
                    yield "pass", groups, parts, {"rows": rows, "tile": tile, "num_warps": warps, "num_stages": stages, "tma": tma}


def _pass(groups: Groups, parts: int, options: dict[str, Any]) -> list[Callable[[], object]]:
    (q, keys, values, tables, _, _), shared = _inputs(groups)
    out = torch.empty((len(q), HEADS, parts, DIM), dtype=torch.float32, device="cuda")
    lse = torch.empty((len(q), HEADS, parts), dtype=torch.float32, device="cuda")
    return [lambda: attend_shared_prefixes(q, keys, values, tables, shared, out, lse, _SCALE, 0.0, parts=parts, **options)] * 4


def plan_jobs() -> Iterator[Job]:
    for groups in _SHAPES[:2]:
        for parts, early in itertools.product((1, 2, 4), (False, True)):
            yield "plan", groups, DecodePlan(1, 2048, 64, parts, False), {"early": early}
        yield "plan", groups, DecodePlan(1, 2048, 64, 1, True), {"early": True}
    for options in ({"num_warps": 4}, {"num_stages": 5}, {"num_stages": 2}, {"tile": 32}, {"tile": 32, "num_warps": 4}):
        yield "plan", _SHAPES[0], DecodePlan(1, 2048, 64, 1, False), {"early": True, **options}


def _plan(groups: Groups, plan: DecodePlan, options: dict[str, Any]) -> list[Callable[[], object]]:
    (q, keys, values, tables, _, lens), shared = _inputs(groups)
    out, longest = torch.empty_like(q), max(prefix for _, prefix in groups) + _OWN
    return [lambda: decode_attention(q, keys, values, tables, lens, out, _SCALE, longest, 0, 0.0, shared, plan=plan, **options)]


def whole_jobs() -> Iterator[Job]:
    shapes: list[Groups] = [((count, prefix),) for count, prefix in itertools.product((4, 8, 32, 256), (256, 1024, 4096))]
    for groups in (*shapes, ((256, 2048),), ((32, 1024), (32, 1024), (32, 1024), (32, 1024), (128, 0)), ((2, 8192), (2, 64), (3, 0))):
        for told in (False, True):
            yield "whole", groups, told


def _whole(groups: Groups, told: bool) -> list[Callable[[], object]]:
    (q, keys, values, tables, _, lens), shared = _inputs(groups)
    out, longest = torch.empty_like(q), max(prefix for _, prefix in groups) + _OWN

    def run(use: bool = told, out: torch.Tensor = out) -> None:
        decode_attention(q, keys, values, tables, lens, out, _SCALE, longest, 0, 0.0, shared if use else None)

    if told:
        both = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
        run(False, both[0])
        for _ in range(5):
            run(True, both[1])
            difference = float((both[0].float() - both[1].float()).abs().max())
            assert difference < 3e-2, f"results are {difference} apart"
    return [run] * 4


def split_jobs() -> Iterator[Job]:
    cases = [(16, 512, parts) for parts in (1, 2, 3, 4)] + [(1, 32768, parts) for parts in (16, 32, 64)]
    for options, (count, context, parts) in itertools.product(({}, {"num_stages": 7}, {"num_warps": 4}), cases):
        yield "split", count, context, DecodePlan(parts, 1, joined=parts > 1), options


def _split(count: int, context: int, plan: DecodePlan, options: dict[str, Any]) -> list[Callable[[], object]]:
    """As many input sets as exceed the second-level cache."""

    def bind(q: Any, keys: Any, values: Any, tables: Any, _: Any, lens: Any) -> Callable[[], object]:
        out = torch.empty_like(q)
        return lambda: decode_attention(q, keys, values, tables, lens, out, _SCALE, context, 0, 0.0, plan=plan, **options)

    sets = max(1, min(16, 220_000_000 // (count * context * 4096) + 1))
    return [bind(*paged_inputs([1] * count, [context] * count)) for _ in range(sets)]


def chunk_jobs() -> Iterator[Job]:
    for case in prefill_cases("triton"):
        for backend in ("triton", "cuda"):
            yield "chunk", case.name, backend


def _chunk(name: str, backend: str) -> list[Callable[[], object]]:
    case: Case = next(case for case in prefill_cases(backend) if case.name == name)
    return [case.make(0)]


_JOBS = {"pass": pass_jobs, "plan": plan_jobs, "whole": whole_jobs, "split": split_jobs, "chunk": chunk_jobs}
_PREPARE: dict[str, Callable[..., list[Callable[[], object]]]] = {
    "pass": _pass, "plan": _plan, "whole": _whole, "split": _split, "chunk": _chunk,
}  # fmt: skip


def warm(job: Job) -> str:
    """Run a job once; what went wrong, or nothing."""
    try:
        _PREPARE[job[0]](*job[1:])[0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        torch.cuda.empty_cache()
    return ""


def time_us(job: Job) -> float:
    runs = _PREPARE[job[0]](*job[1:])
    return 1e3 * ceilings.graph_median_ms(lambda: [run() for run in runs]) / len(runs)


def main() -> int:
    jobs = [job for kind in [x for x in sys.argv[1:] if x in _JOBS] or _JOBS for job in _JOBS[kind]()]
    if "--warm" in sys.argv:
        with multiprocessing.get_context("spawn").Pool(10) as pool:
            print("failed:", [(job, failure) for job, failure in zip(jobs, pool.map(warm, jobs, chunksize=1), strict=True) if failure])
        return 0
    for job in jobs:
        try:
            print(*job, "|", f"{time_us(job):.1f} us", flush=True)
        except Exception as error:  # one failure must not hide the other figures
            print(*job, "|", f"{type(error).__name__}: {error}"[:300], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
