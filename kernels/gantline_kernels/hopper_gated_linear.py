"""The gated half of a feed-forward layer by `cuda_kernels/gated_linear_hopper.cu`: where it is used, its tiles, its launch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from gantline_kernels import devices, library

__all__ = ["TILES", "GatedTile", "choose_tile", "gated_linear", "has_gated_linear", "wins"]


class GatedTile(NamedTuple):
    """Outputs of a tile; and of more than 128 rows, how many times 128 it has."""

    columns: int
    groups: int


TILES = tuple(GatedTile(columns, 2) for columns in (128, 112, 96, 80, 64)) + tuple(GatedTile(columns, 3) for columns in (96, 80, 64))
"""What the kernel is built for."""
_ROWS, _DEPTH = 128, 64
_FEW_ROWS = 24
"""Up to so many rows our kernels for few rows, the activation and what is around them overlap, and are faster together."""
_BESIDE_WEIGHTS = range(160, 257)
"""Rows for which reading the weights hides the work for rows that are nobody's."""
_LEAST_FILL = 0.75
"""Of the blocks' time, what must be spent on tiles, where reading the weights takes most of it."""
_LEAST_USE = ((4 * 128, 0.64), (1 << 31, 0.75))
"""Up to so many rows: of the blocks' time, what must be spent on rows and outputs that are somebody's, where the matrix units bound it."""
_TYPES = {torch.bfloat16: 0, torch.float16: 1}
_MULTIPLIED = 2048
"""Products that a multiprocessor adds in a clock."""
_TILE_CLOCKS = 3000
"""What a tile's beginning and end take."""


def has_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these, and is to; the caller knows whether it is built, and the chip."""
    (rows, inputs), (outputs, _) = x.shape, weight.shape
    if x.dtype not in _TYPES or weight.dtype != x.dtype or outputs % 8 or inputs % 8 or not inputs:
        return False
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and weight.is_contiguous() and wins(rows, outputs // 2, inputs, devices.num_sms(x.device.index))


@cache
def wins(rows: int, width: int, inputs: int, num_sms: int) -> bool:
    """Whether it is faster than a linear layer and the activation apart (docs/perf-log.md)."""
    tile = choose_tile(rows, width, inputs, num_sms)
    blocks, clocks = num_sms // 2 * 2, _clocks(tile, rows, width, inputs, num_sms)
    if rows <= _ROWS or rows in _BESIDE_WEIGHTS:
        tiles = width * (1 if rows <= _ROWS else 2)
        fill = tiles / (_rounds(tile, rows, width, blocks) * blocks * tile.columns)
        return rows > _FEW_ROWS and fill >= _LEAST_FILL
    least = next(least for limit, least in _LEAST_USE if rows <= limit)
    return rows > 2 * _ROWS and rows * 2 * width * inputs / (_MULTIPLIED * blocks) >= least * clocks


@cache
def choose_tile(rows: int, width: int, inputs: int, num_sms: int) -> GatedTile:
    """The one with which the blocks are done first."""
    tiles = [tile for tile in TILES if tile.groups == 2 or rows > 2 * _ROWS]
    return min(tiles, key=lambda tile: _clocks(tile, rows, width, inputs, num_sms))


def _clocks(tile: GatedTile, rows: int, width: int, inputs: int, num_sms: int) -> int:
    """Of a multiprocessor, its matrix units never idle within a tile: a block has two stretches of columns, and half its tile's rows."""
    height = 64 * (1 if rows <= _ROWS // 2 else tile.groups)
    products = -(-inputs // _DEPTH) * _DEPTH * height * 2 * tile.columns
    return _rounds(tile, rows, width, num_sms // 2 * 2) * (products // _MULTIPLIED + _TILE_CLOCKS)


def _rounds(tile: GatedTile, rows: int, width: int, blocks: int) -> int:
    blocks_high = 1 if rows <= _ROWS else 2 * -(-rows // (_ROWS * tile.groups))
    return -(-blocks_high * -(-width // tile.columns) // blocks)


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, tile: GatedTile | None = None, blocks: int = 0
) -> torch.Tensor:
    """silu(gate) * up -> [T, I] in the type of x, of gate, then up = x [T, K] @ weight [2 I, K]^T + bias [2 I].

    For what `has_gated_linear` takes, and any number of rows. `tile` and `blocks` are for tuning; None, 0: chosen.
    """
    (rows, inputs), width = x.shape, weight.shape[0] // 2
    # As much memory as where gate and up meet it, though nothing is written there: what a step takes must not hinge on how its rows divide.
    gate_and_up = torch.empty((rows, 2 * width), dtype=x.dtype, device=x.device)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    del gate_and_up
    blocks = blocks or devices.num_sms(x.device.index) // 2 * 2
    columns, groups = tile or choose_tile(rows, width, inputs, blocks)
    library.call(
        "gantline_gated_linear_hopper", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), rows, inputs, width, columns, groups, blocks,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    return out
