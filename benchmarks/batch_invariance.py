"""What `batch_invariant` costs on a GPU, and that it holds: `python -m benchmarks.batch_invariance --model DIR [--requests N]`.

The same requests with the setting off and on, on one machine in one run: tokens a second, median of the repeats, prefix reuse on but the
cache emptied before each. Then some requests of the last run with the setting on are asked again, each alone, and their tokens and
log-probabilities must be those that they had in the crowd, to the last bit; with the setting off, how many differ is printed beside it.

`--tune` times the linear layers' tiles and attention's instead, against the backend `cuda`, and compares all tiles' results bit by bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gantline_kernels import api
from gantline_kernels.triton_kernels import invariant_attention, invariant_linear
from gantline_kernels.triton_kernels.invariant_linear import TILES, Tile, choose_tile
from gantline_runtime import garbage
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine

from benchmarks import ceilings, workloads
from benchmarks.kernels import DIM, paged_inputs
from benchmarks.linear import HEAD, SHAPES
from benchmarks.throughput import Run, run_once

Requests = list[tuple[list[int], int]]
_COPIES = 3
"""Of each weight, timed one after the other: together they exceed the second-level cache."""
MORE_TILES = (
    Tile(128, 16, 4, 6, 0.15), Tile(64, 32, 4, 7, 0.2), Tile(128, 32, 4, 5, 0.25), Tile(128, 64, 4, 4, 0.4), Tile(64, 128, 4, 4, 0.4),
    Tile(128, 128, 8, 3, 0.5), Tile(128, 128, 8, 4, 0.5), Tile(128, 256, 8, 3, 0.75), Tile(256, 128, 8, 3, 0.75), Tile(64, 256, 4, 4, 0.6),
)  # fmt: skip
"""Tried with `--tune`; their shares are read by nobody."""
ATTENTION: list[dict[str, Any]] = [
    {}, {"num_stages": 3}, {"num_warps": 8}, {"rows": 128, "num_warps": 8}, {"rows": 128, "num_warps": 8, "num_stages": 3},
    {"tile": 32}, {"tile": 32, "num_stages": 3}, {"tma": False},
]  # fmt: skip
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "256 single queries, contexts of 100 to 1100": ([1] * 256, [100 + i * 1000 // 256 for i in range(256)]),
    "16 single queries, contexts of 8192": ([1] * 16, [8192] * 16),
    "1 single query, context of 2000": ([1], [2000]),
    "1 single query, context of 32768": ([1], [32768]),
    "32 prompts of 256": ([256] * 32, [256] * 32),
    "2 prompts of 4096": ([4096] * 2, [4096] * 2),
    "1 chunk of 2048 at 32768": ([2048], [32768]),
}


# ---- the price


def measure(model: Path, config: EngineConfig, requests: Requests, repeats: int, checked: list[int]) -> dict[str, Any]:
    """Figures of one engine; of the requests `checked`, how many differ when they are asked again, each alone."""
    started = time.perf_counter()
    engine = LLMEngine(model, config)
    load_seconds = time.perf_counter() - started
    run_once(engine, requests[:64])
    garbage.settle()
    runs = [run_once(engine, requests, set(checked)) for _ in range(repeats)]
    seconds = statistics.median(run.seconds for run in runs)
    alone = [run_once(engine, [requests[i]], {0}) for i in checked]
    engine.check_integrity()
    engine.close()
    del engine
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache() if torch.cuda.is_available() else None
    return {
        "out_tok_s": round(sum(count for _, count in requests) / seconds, 1),
        "seconds": [round(run.seconds, 3) for run in runs],
        "load_seconds": round(load_seconds, 1),
        "alone_ms_a_token": round(1e3 * sum(run.seconds for run in alone) / sum(requests[i][1] for i in checked), 2),
        "asked_again": len(checked),
        "other_tokens_alone": sum(differ(runs[-1], i, one, tokens=True) for i, one in zip(checked, alone, strict=True)),
        "other_bits_alone": sum(differ(runs[-1], i, one, tokens=False) for i, one in zip(checked, alone, strict=True)),
    }


def differ(crowd: Run, index: int, alone: Run, *, tokens: bool) -> bool:
    """Whether request `index` of a run got other tokens, or also other log-probabilities, than alone."""
    if crowd.tokens[index] != alone.tokens[0]:
        return True
    return not tokens and crowd.logprobs[index] != alone.logprobs[0]


def measure_price(model: Path, config: EngineConfig, requests: Requests, repeats: int, num_checked: int) -> bool:
    checked = sorted({i * (len(requests) - 1) // max(1, num_checked - 1) for i in range(num_checked)})
    figures = {}
    for name, setting in (("off", False), ("on", True)):
        figures[name] = measure(model, replace(config, batch_invariant=setting), requests, repeats, checked)
        print(f"batch_invariant {name}", json.dumps(figures[name]), flush=True)
    price = figures["off"]["out_tok_s"] / figures["on"]["out_tok_s"]
    holds = figures["on"]["other_bits_alone"] == 0
    print(f"off is {price:.2f} times as fast; {'held' if holds else 'NOT HELD'} for {len(checked)} requests", flush=True)
    return holds


# ---- tiles


def tune_linear(deadline: float, row_counts: list[int]) -> bool:
    """Microseconds of each tile for a layer's shapes and the head. False if two tiles' results differ."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    weights = {shape: [_bf16(*shape) * shape[1] ** -0.5 for _ in range(_COPIES if shape != HEAD else 1)] for shape in [*SHAPES, HEAD]}
    same = _same_bits(weights[SHAPES[0]][0]) & _same_bits(weights[SHAPES[-1]][0])
    for rows in row_counts:
        layer: dict[str, float] = {}
        for outputs, inputs in weights:
            if time.monotonic() > deadline:
                print("out of time", flush=True)
                return same
            x, copies = _bf16(rows, inputs), weights[outputs, inputs]
            out_dtype = torch.float32 if (outputs, inputs) == HEAD else None
            times = {"cuda": _us(copies, lambda w, x=x, t=out_dtype: api.linear(x, w, out_dtype=t, backend="cuda"))}
            for tile in (*TILES, *MORE_TILES):
                if tile.rows > 2 * max(rows, 16):
                    continue
                run = partial(invariant_linear.invariant_linear, x, bias=None, out_dtype=out_dtype, tile=tile)
                times[_name(tile)] = _us(copies, lambda w, run=run: run(weight=w))
            chosen = _name(choose_tile(TILES, rows, outputs, sms))
            best = min((name for name in times if name != "cuda"), key=lambda name: times[name])
            print(f"{rows} rows, {outputs} x {inputs}: chosen {chosen}, best {best}", json.dumps(times), flush=True)
            if (outputs, inputs) != HEAD:
                for key, name in (("cuda", "cuda"), ("chosen", chosen), ("best", best)):
                    layer[key] = round(layer.get(key, 0.0) + times[name], 1)
        print(f"{rows} rows, a layer:", json.dumps(layer), flush=True)
    return same


def _same_bits(weight: torch.Tensor) -> bool:
    x = _bf16(300, weight.shape[1])
    expected = invariant_linear.invariant_linear(x, weight, None, torch.float32, tile=TILES[0])
    error = float((expected - F.linear(x.float(), weight.float())).abs().max())
    others = {}
    for tile in (*TILES, *MORE_TILES):
        for tma in (True, False) if tile in TILES else (True,):
            try:
                out = invariant_linear.invariant_linear(x, weight, None, torch.float32, tile=tile, tma=tma)
            except Exception as problem:
                print(_name(tile), "tma" if tma else "pointers", f"{type(problem).__name__}: {problem}"[:160], flush=True)
                continue
            others[f"{_name(tile)}{'' if tma else ' pointers'}"] = torch.equal(out, expected)
    bad = [name for name, ok in others.items() if not ok]
    print(
        f"{list(weight.shape)}: {len(others)} tiles have {'the same bits' if not bad else f'OTHER BITS: {bad}'}; error {error:.2e}",
        flush=True,
    )
    return not bad


def compile_all() -> None:
    """Every variant into Triton's cache, by several processes at once."""
    tiles = len(TILES) + len(MORE_TILES)
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(_compile_one, [*range(-len(ATTENTION), 0), *range(tiles)], chunksize=1)


def _compile_one(number: int) -> None:
    with suppress(Exception):  # told where it is timed
        if number < 0:
            for queries in ([1, 1], [70]):
                q, *others = paged_inputs(queries, [2000] * len(queries))
                invariant_attention.invariant_attention(
                    q, *others, torch.empty_like(q), DIM**-0.5, int(queries[0] == 1) * 2, 2000, 0, 0.0, **ATTENTION[number]
                )
            return
        tile = (*TILES, *MORE_TILES)[number]
        x, weight = _bf16(32, 4096), _bf16(6144, 4096)
        for out_dtype, tma in ((None, True), (torch.float32, True), (torch.float32, False)):
            if tma or tile in TILES:
                invariant_linear.invariant_linear(x, weight, None, out_dtype, tile=tile, tma=tma)


def _name(tile: Tile) -> str:
    return f"{tile.outputs}x{tile.rows} {tile.warps}w {tile.stages}s"


def _us(copies: list[torch.Tensor], run: Callable[[torch.Tensor], object]) -> float:
    def all_copies() -> None:
        for weight in copies:
            run(weight)

    try:
        return round(1e3 * ceilings.graph_median_ms(all_copies, repeats=7) / len(copies), 1)
    except Exception as problem:
        print(f"{type(problem).__name__}: {problem}"[:160], flush=True)
        return float("inf")


def tune_attention(deadline: float) -> None:
    for name, (queries, contexts) in BATCHES.items():
        q, keys, values, tables, starts, lens = paged_inputs(queries, contexts)
        decodes = len(queries) if max(queries) == 1 else 0
        out, bound = torch.empty_like(q), max(contexts)

        def usual(q=q, keys=keys, values=values, tables=tables, starts=starts, lens=lens, decodes=decodes, bound=bound, n=max(queries)):  # type: ignore[no-untyped-def]
            options = {"max_query_len": n, "max_context_len": bound, "num_decodes": decodes}
            return api.paged_attention(q, keys, values, tables, starts, lens, DIM**-0.5, **options, backend="cuda")

        times = {"cuda": _us([q], lambda _, usual=usual: usual())}
        for label, options, piece in _attention_variants():
            if time.monotonic() > deadline:
                print("out of time", flush=True)
                return
            invariant_attention.PIECE = piece
            inputs = (q, keys, values, tables, starts, lens, out, DIM**-0.5, decodes, bound, 0, 0.0)
            times[label] = _us([q], lambda _, inputs=inputs, options=options: invariant_attention.invariant_attention(*inputs, **options))
        print(name, json.dumps(times), flush=True)


def _attention_variants() -> Iterator[tuple[str, dict[str, Any], int]]:
    for options in ATTENTION:
        yield " ".join(f"{key} {value}" for key, value in options.items()) or "chosen", options, 1024
    for piece in (512, 2048):
        yield f"pieces of {piece}", {}, piece


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--workload", choices=workloads.NAMES, default="chat")
    parser.add_argument("--requests", type=int, default=512, help="only so many of the workload")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--checked", type=int, default=8, help="requests that are asked again alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--num-cache-blocks", type=int)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64, 128, 256, 512, 2048], help="with --tune")
    parser.add_argument("--seconds", type=float, default=110.0, help="with --tune: stop after so long")
    options = parser.parse_args()
    if options.tune:
        deadline = time.monotonic() + options.seconds
        compile_all()
        print(f"compiled, {deadline - time.monotonic():.0f} s left", flush=True)
        tune_attention(deadline)
        return 0 if tune_linear(deadline, options.rows) else 1
    if options.model is None:
        parser.error("--model is needed")
    config = EngineConfig(
        dtype="bfloat16",
        max_batch_size=256,
        max_waiting=4096,
        max_step_ms=0.0,
        device=options.device,
        num_cache_blocks=options.num_cache_blocks,
    )
    requests = workloads.build(options.workload).requests[: options.requests]
    return 0 if measure_price(options.model, config, requests, options.repeats, options.checked) else 1


if __name__ == "__main__":
    sys.exit(main())
