"""Linear layers of many inputs and few outputs by `cuda_kernels/split_linear_hopper.cu`: where it is used, its scratch, its launch."""

from __future__ import annotations

from functools import cache

import torch

from gantline_kernels import devices, library
from gantline_kernels.scratch import kept

__all__ = ["MAX_ROWS", "PARTS", "choose_parts", "has_split_linear", "split_linear"]

MAX_ROWS = 256
PARTS = (4, 2)
"""Numbers of blocks that may share a tile's inputs."""
_ROWS, _OUTPUTS, _DEPTH = 128, 128, 64
_MAX_TILES = 1024
_LEAST_FILL = 0.8
_LEAST_CHUNKS = 24
"""Chunks of inputs of a part, so that leaving and adding up its sums is little beside them."""
_WINS = range(33, 129), range(208, 257)
"""Numbers of rows for which it is faster than cuBLAS (docs/perf-log.md)."""
_TYPES = {torch.bfloat16: 0, torch.float16: 1}


def has_split_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these, and is to; the caller knows whether it is built, and the chip."""
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if not any(rows in wins for wins in _WINS) or x.dtype not in _TYPES or weight.dtype != x.dtype or inputs % 8 or outputs % 2:
        return False
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and weight.is_contiguous() and choose_parts(rows, outputs, inputs, devices.num_sms(x.device.index)) is not None


@cache
def choose_parts(rows: int, outputs: int, inputs: int, num_sms: int) -> int | None:
    """The number of blocks that share a tile, with which nearly all multiprocessors have one; None: there is none."""
    tiles, chunks = -(-outputs // _OUTPUTS) * _high(rows), -(-inputs // _DEPTH)
    fits = (_LEAST_FILL * num_sms <= tiles * parts <= num_sms // 2 * 2 and chunks >= parts * _LEAST_CHUNKS for parts in PARTS)
    return next((parts for parts, good in zip(PARTS, fits, strict=True) if good), None)


def _high(rows: int) -> int:
    return 1 if rows <= _ROWS else 2


def split_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, parts: int = 0) -> torch.Tensor:
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N] in the type of x. For what `has_split_linear` takes, and any T up to MAX_ROWS.

    `parts` is for tuning; 0: chosen. Raises RuntimeError if a device's first call is captured (`scratch.py`), or if not all blocks would
    run at once.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    parts = parts or choose_parts(rows, outputs, inputs, devices.num_sms(x.device.index)) or PARTS[-1]
    tiles = -(-outputs // _OUTPUTS) * _high(rows)
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    sums = torch.empty(tiles * parts * _ROWS * _OUTPUTS, dtype=torch.float32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    counters = kept(_new_counters, x.device.index, stream)
    library.call(
        "gantline_split_linear_hopper", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), rows, inputs, outputs, parts, sums.data_ptr(), counters.data_ptr(),
        stream,
    )  # fmt: skip
    return out


def _new_counters(index: int) -> torch.Tensor:
    return torch.zeros(2 * _MAX_TILES, dtype=torch.int32, device=f"cuda:{index}")
