"""Linear layers: every way we have, checked, and timed against the floor: `python -m benchmarks.linear [--rows 1 16 32]`.

Needs a GPU. A time is the median of replays of a CUDA graph over eight layers of Llama 3.1 8B (3.5 GB of weights: nothing is found in the
second-level cache): all shapes in a chain, whole layers (with norms, rope and activation between, without attention), each shape alone, and
the head, whose results are float32. The floor is the larger of the weights' bytes at the rate of reading measured in the same call, and the
operations at 700 TFLOP/s. Results are compared with float32 first, and two runs with each other. The last lines are the tables: percent of
that floor, by rows, in the chain and in whole layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gantline_kernels import (
    api,
    devices,
    few_rows_linear,
    hopper_batch_linear,
    hopper_gated_linear,
    hopper_split_linear,
    library,
    reference,
    torch_backend,
)
from gantline_kernels.triton_kernels.linear import one_row_linear

from benchmarks import ceilings

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
HEAD = (128256, 4096)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4096, 32, 8, 128
LAYERS = 8
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_OPERATIONS = 700e12
_LARGEST_ERROR = 0.06
"""Of results of size 4 at most, in bfloat16: twice its rounding and the sums' order."""
_LARGEST_SHARE = 0.01
"""Error of a gated layer's results, of the largest of them."""
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype | None], torch.Tensor]
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Layers = list[list[torch.Tensor]]

ONE_ROW: list[dict[str, Any]] = [
    {},
    {"early": True},
    {"early": False},
    {"outputs_each": 8, "warps": 8},
    {"outputs_each": 2, "depth": 4096},
    {"outputs_each": 16, "depth": 512},
]


def one_row(options: dict[str, Any]) -> Linear:
    return lambda x, w, b, d: one_row_linear(x, w, b, d, **options)


def _split(parts: int, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, d: torch.dtype | None) -> torch.Tensor:
    """With the first tiles of so many parts that all run at once on most multiprocessors; cuBLAS where there are none."""
    count = devices.num_sms(0)
    for tiles in hopper_split_linear.TILES:
        high = 1 if len(x) <= 128 else 2 * -(-len(x) // (128 * tiles.groups))
        blocks = -(-w.shape[0] // tiles.width) * tiles.parts * high
        if d is None and tiles.parts == parts and count // 2 <= blocks <= count // 2 * 2:
            return hopper_split_linear.split_linear(x, w, b, tiles=tiles)
    return torch_backend.linear(x, w, b, d)


def variants(rows: int) -> Iterator[tuple[str, Linear]]:
    yield "cuBLAS", torch_backend.linear
    for backend in ("triton", "cuda"):
        yield f"api, {backend}", lambda x, w, b, d, backend=backend: api.linear(x, w, b, out_dtype=d, backend=backend)
    if library.load() is not None and rows <= few_rows_linear.MAX_ROWS:
        yield "cuda, few rows", few_rows_linear.few_rows_linear
        yield "cuda, few rows, not early", partial(few_rows_linear.few_rows_linear, early=False)
    if library.load() is not None and rows <= hopper_split_linear.MAX_ROWS:
        for parts in (4, 2):
            yield f"cuda, split into {parts}", partial(_split, parts)
    if library.load() is not None and rows <= hopper_batch_linear.MAX_ROWS:
        yield "cuda, batch", hopper_batch_linear.batch_linear
    if rows == 1:
        for options in ONE_ROW:
            yield f"one row {options or ''}".strip(), one_row(options)


def error_of(run: Linear, rows: int, weights: list[torch.Tensor]) -> float:
    """Largest error against float32 over a layer's shapes; infinity for what is not finite, or differs from run to run."""
    worst = 0.0
    for w in weights:
        wide = torch.randn(rows, w.shape[1] + 64, device="cuda", dtype=torch.bfloat16)
        x, bias = wide[:, : w.shape[1]], torch.randn(w.shape[0], device="cuda", dtype=torch.bfloat16)
        got, again = run(x, w, bias, None), run(x, w, bias, None)
        if not bool(torch.isfinite(got).all()) or not torch.equal(got, again):
            return float("inf")
        worst = max(worst, float((got.float() - reference.linear(x, w, bias)).abs().max()))
    return worst


def measure(run: Linear, rows: int, layers: Layers, head: torch.Tensor) -> dict[str, Any]:
    """Microseconds of a layer in the chain, of a whole one, of each shape alone and of the head, and the largest error."""
    xs = {k: torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _, k in SHAPES}

    def chain(picked: Layers) -> None:
        for layer in picked:
            for w in layer:
                run(xs[w.shape[1]], w, None, None)

    alone = [[[layer[i]] for layer in layers] for i in range(len(SHAPES))]
    return {
        "error": round(error_of(run, rows, layers[0]), 4),
        "us": round(_graph_us(partial(chain, layers)) / LAYERS, 2),
        "layer_us": round(_graph_us(partial(whole_layers, run, _apart(run), rows, layers)) / LAYERS, 2),
        "shapes_us": [round(_graph_us(partial(chain, picked)) / LAYERS, 2) for picked in alone],
        "head_us": round(_graph_us(lambda: run(xs[HEAD[1]], head, None, torch.float32)), 1),
    }


def whole_layers(run: Linear, gate: Gate, rows: int, layers: Layers) -> torch.Tensor:
    """What attention does not take of Llama's layers, with what stands between the products."""
    norm, positions = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16), torch.arange(rows, device="cuda")
    caches = [torch.zeros(rows, KV_HEADS, 16, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    table, slots = torch.ones(rows, HEAD_DIM, device="cuda"), positions * 16
    h, residual = (torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))  # equal rows would take less power
    for qkv, out, up, down in layers:
        h, residual = api.add_rms_norm(h, residual, norm, 1e-5, backend="cuda")
        heads = run(h, qkv, None, None).unflatten(-1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q = api.rope_and_cache_write(*heads, table, positions, *caches, slots, backend="cuda")
        h, residual = api.add_rms_norm(run(q.flatten(1), out, None, None), residual, norm, 1e-5, backend="cuda")
        h = run(gate(h, up), down, None, None)
    return h


def _apart(run: Linear) -> Gate:
    """The activation as a kernel of its own."""
    return lambda x, w: api.silu_and_mul(run(x, w, None, None), backend="cuda")


def _gated(tile: hopper_gated_linear.GatedTile | None, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hopper_gated_linear.gated_linear(x, weight, None, tile=tile)


def gates() -> Iterator[tuple[str, Gate]]:
    """For whole layers whose other products are `api.linear`'s: the gated half as it is chosen, and every way that there is."""
    yield "api", lambda x, w: api.gated_linear(x, w, backend="cuda")
    yield "apart", _apart(lambda x, w, b, d: api.linear(x, w, b, out_dtype=d, backend="cuda"))
    if library.load() is not None:
        for tile in (None, *hopper_gated_linear.TILES):
            yield f"gated, {tuple(tile) if tile else 'chosen'}", partial(_gated, tile)


def compare_gates(counts: list[int], layers: Layers, deadline: float) -> int:
    """Print microseconds of a whole layer by rows and by how gate and up are made; every way is timed twice, in turns."""
    wrong = 0
    for rows in counts:
        x, (_, _, up, _) = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16), layers[0]
        expected, line = reference.gated_linear(x, up), {}
        for name, gate in [*gates()] * 2:
            error = float((gate(x, up).float() - expected).abs().max() / expected.abs().max())
            wrong += not error < _LARGEST_SHARE
            chain = partial(whole_layers, lambda x, w, b, d: api.linear(x, w, b, out_dtype=d, backend="cuda"), gate, rows, layers)
            line.setdefault(name, []).append(round(_graph_us(chain) / LAYERS, 1))
        print(json.dumps({"rows": rows, **line}), flush=True)
        if time.monotonic() > deadline:
            break
    return min(1, wrong)


def _graph_us(call: Callable[[], object]) -> float:
    return 1e3 * ceilings.graph_median_ms(call)


def _floor_us(rows: int, outputs: int, inputs: int, read: float) -> float:
    return 2e6 * outputs * inputs * max(1 / read, rows / _OPERATIONS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--gated", action="store_true", help="only whole layers, by how the gated half of the feed-forward layer is made")
    parser.add_argument("--seconds", type=float, default=100.0, help="stop measuring after so long, and print the table")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    layers = [[torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for n, k in SHAPES] for _ in range(LAYERS)]
    if args.gated:
        return compare_gates(args.rows, layers, deadline)
    head = torch.randn(*HEAD, device="cuda", dtype=torch.bfloat16) * HEAD[1] ** -0.5
    rates = ceilings.measure()
    print(json.dumps(rates), flush=True)
    tables: dict[str, dict[str, dict[int, str]]] = {"us": {}, "layer_us": {}}
    ok = True
    for rows in args.rows:
        floor_us = sum(_floor_us(rows, *shape, 1e12 * rates["read_TB_s"]) for shape in SHAPES)
        for name, run in variants(rows):
            if time.monotonic() > deadline:
                break
            try:
                line = measure(run, rows, layers, head)
            except RuntimeError as error:  # one failure must not hide the other figures
                line = {"error": float("inf"), "failed": str(error)[:200]}
            right = line["error"] <= _LARGEST_ERROR
            ok = ok and right
            for figure, table in tables.items():
                table.setdefault(name, {})[rows] = f"{100 * floor_us / line[figure]:.1f}" if right else "wrong"
            print(json.dumps({"rows": rows, "variant": name, **line}), flush=True)
    for title, table in zip(("chain", "layer"), tables.values(), strict=True):
        print(f"| {title} | " + " | ".join(map(str, args.rows)) + " |")
        for name, cells in table.items():
            print(f"| {name} | " + " | ".join(cells.get(rows, "") for rows in args.rows) + " |")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
