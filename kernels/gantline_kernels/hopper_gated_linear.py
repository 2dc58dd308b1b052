"""The gated half of a feed-forward layer by `cuda_kernels/gated_linear_hopper.cu`: where it is used, its tiles, its launch."""

from __future__ import annotations

from functools import cache

import torch

from gantline_kernels import devices, library

__all__ = ["COLUMNS", "choose_columns", "gated_linear", "has_gated_linear", "wins"]

COLUMNS = (128, 112, 96, 80, 64)
"""Outputs of a tile that the kernel is built for."""
_ROWS = 128
_FEW_ROWS = 24
"""Up to so many rows our kernels for few rows, the activation and what is around them overlap, and are faster together."""
_LEAST_FILL = 0.75
_TYPES = {torch.bfloat16: 0, torch.float16: 1}
_BEGINNING = 12
"""What a tile's beginning and end cost, in columns."""


def has_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these, and is to; the caller knows whether it is built, and the chip."""
    (rows, inputs), (outputs, _) = x.shape, weight.shape
    if x.dtype not in _TYPES or weight.dtype != x.dtype or outputs % 4 or inputs % 8 or not inputs:
        return False
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and weight.is_contiguous() and wins(rows, outputs // 2, devices.num_sms(x.device.index))


@cache
def wins(rows: int, width: int, num_sms: int) -> bool:
    """Whether it is faster than a linear layer and the activation apart (docs/perf-log.md): where the tiles fill the multiprocessors, up to
    one tile's rows, and where few of the last two tiles' rows are nobody's."""
    columns, row_tiles, blocks = choose_columns(rows, width, num_sms), _row_tiles(rows), num_sms // 2 * 2
    if row_tiles * width < _LEAST_FILL * _rounds(row_tiles, width, columns, blocks) * blocks * columns:
        return False
    if rows <= _ROWS:
        return rows > _FEW_ROWS
    idle = -rows % (2 * _ROWS)
    return idle <= _ROWS // 2 or idle * 16 <= rows


@cache
def choose_columns(rows: int, width: int, num_sms: int) -> int:
    """The number of outputs of a tile with which the last round of tiles leaves the fewest multiprocessors idle."""
    row_tiles, blocks = _row_tiles(rows), num_sms // 2 * 2
    return min(COLUMNS, key=lambda columns: _rounds(row_tiles, width, columns, blocks) * (columns + _BEGINNING))


def _row_tiles(rows: int) -> int:
    return 1 if rows <= _ROWS else 2 * -(-rows // (2 * _ROWS))


def _rounds(row_tiles: int, width: int, columns: int, blocks: int) -> int:
    return -(-row_tiles * -(-width // columns) // blocks)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, columns: int = 0, blocks: int = 0) -> torch.Tensor:
    """silu(gate) * up -> [T, I] in the type of x, of gate, then up = x [T, K] @ weight [2 I, K]^T + bias [2 I].

    For what `has_gated_linear` takes, and any number of rows. `columns` and `blocks` are for tuning; 0: chosen.
    """
    (rows, inputs), width = x.shape, weight.shape[0] // 2
    # As much memory as where gate and up meet it, though nothing is written there: what a step takes must not hinge on how its rows divide.
    gate_and_up = torch.empty((rows, 2 * width), dtype=x.dtype, device=x.device)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    del gate_and_up
    blocks = blocks or devices.num_sms(x.device.index) // 2 * 2
    columns = columns or choose_columns(rows, width, blocks)
    library.call(
        "gantline_gated_linear_hopper", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), rows, inputs, width, columns, blocks,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    return out
