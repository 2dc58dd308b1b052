"""Linear layers of many inputs and few outputs by `cuda_kernels/split_linear_hopper.cu`: where it is used, its scratch, its launch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from gantline_kernels import devices, library
from gantline_kernels.scratch import kept

__all__ = ["MAX_ROWS", "TILES", "Tiles", "choose_tiles", "has_split_linear", "split_linear"]

MAX_ROWS = 384
_ROWS, _DEPTH = 128, 64
_MAX_TILES = 1024
_LEAST_FILL = 0.8
_LEAST_CHUNKS = ((range(25, 65), 16), (range(65, 129), 24), (range(208, 257), 48), (range(321, 385), 96))
"""Numbers of rows for which it is faster than cuBLAS, and of the chunks of inputs of a part then (docs/perf-log.md): leaving and adding up
its sums must be little beside them. Up to 64 rows shorter ones win too, since the kernels on both sides overlap then."""


class Tiles(NamedTuple):
    """Outputs of a tile; blocks that share its inputs (pairs of blocks, of more than 128 rows); how many times 128 rows it has then."""

    width: int
    parts: int
    groups: int = 2


TILES = (Tiles(128, 4), Tiles(128, 2), Tiles(192, 4), Tiles(192, 2), Tiles(128, 2, 3))
_TYPES = {torch.bfloat16: 0, torch.float16: 1}


def has_split_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these, and is to; the caller knows whether it is built, and the chip."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if x.dtype not in _TYPES or weight.dtype != x.dtype or inputs % 8 or outputs % 4:
        return False
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and weight.is_contiguous() and choose_tiles(rows, outputs, inputs, devices.num_sms(x.device.index)) is not None


@cache
def choose_tiles(rows: int, outputs: int, inputs: int, num_sms: int) -> Tiles | None:
    """Tiles with which nearly all multiprocessors have a block, and parts are long enough; None: there are none."""
    least = next((least for wins, least in _LEAST_CHUNKS if rows in wins), None)
    if least is None:
        return None
    chunks, most = -(-inputs // _DEPTH), num_sms // 2 * 2
    for tiles in TILES:
        blocks = -(-outputs // tiles.width) * tiles.parts * _high(rows, tiles.groups)
        tall = rows > 2 * _ROWS
        if (tiles.groups == 3) == tall and _LEAST_FILL * num_sms <= blocks <= most and chunks >= tiles.parts * least:
            return tiles
    return None


def _high(rows: int, groups: int) -> int:
    """Blocks from a matrix's first row to its last."""
    return 1 if rows <= _ROWS else 2 * -(-rows // (groups * _ROWS))


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, tiles: Tiles | None = None) -> torch.Tensor:
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N] in the type of x. For what `has_split_linear` takes, and any T up to MAX_ROWS.

    `tiles` is for tuning; None: chosen. Raises RuntimeError if a device's first call is captured (`scratch.py`), or if not all blocks would
    run at once.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    width, parts, groups = tiles or choose_tiles(rows, outputs, inputs, devices.num_sms(x.device.index)) or TILES[1]
    count = -(-outputs // width) * _high(rows, groups)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    sums = torch.empty(count * parts * max(_ROWS, 64 * groups) * width, dtype=torch.float32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    counters = kept(_new_counters, x.device.index, stream)
    library.call(
        "gantline_split_linear_hopper", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), rows, inputs, outputs, width, parts, groups, sums.data_ptr(),
        counters.data_ptr(), stream,
    )  # fmt: skip
    return out


def _new_counters(index: int) -> torch.Tensor:
    return torch.zeros(2 * _MAX_TILES, dtype=torch.int32, device=f"cuda:{index}")
