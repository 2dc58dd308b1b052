"""Linear layers for batches by `cuda_kernels/linear_batch_hopper.cu`: where it is used, its scratch memory, its launch."""

from __future__ import annotations

import torch

from gantline_kernels import devices, library
from gantline_kernels.few_rows_linear import fits_few_rows_linear
from gantline_kernels.scratch import kept

__all__ = ["MAX_ROWS", "batch_linear", "has_batch_linear"]

MAX_ROWS = 64
_OUTPUTS, _DEPTH = 128, 2 * 64
_MAX_TILES, _MAX_CHUNKS = 8192, 1 << 20
_TYPES = {torch.bfloat16: 0, torch.float16: 1}
_EVERY_LAYER = range(17, 33)
"""Rows for which the kernel is at least as fast as cuBLAS in a layer, with norms, rope and activation between (docs/perf-log.md); layers of
shapes that `hopper_split_linear` fills the multiprocessors with are its own from 25 rows on."""
_LARGE_WEIGHT = 400_000_000
"""A weight of so many elements, such as a model's head, is faster with it up to MAX_ROWS; a layer's are not."""


def has_batch_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these, and is to; the caller knows whether it is built, and the chip."""
    rows = x.shape[0]
    if rows not in _EVERY_LAYER and (not _EVERY_LAYER.stop <= rows <= MAX_ROWS or weight.numel() < _LARGE_WEIGHT):
        return False
    tiles, chunks = -(-weight.shape[0] // _OUTPUTS), -(-weight.shape[1] // _DEPTH)
    return fits_few_rows_linear(x, weight, MAX_ROWS) and tiles <= _MAX_TILES and tiles * chunks <= _MAX_CHUNKS


def batch_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N] in the type of x or `out_dtype`, for what `fits_few_rows_linear` up to MAX_ROWS.

    Raises RuntimeError if a device's first call is captured (`scratch.py`).
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    out = torch.empty((rows, outputs), dtype=out_dtype or x.dtype, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    sums, counters = kept(_new_scratch, x.device.index, stream)
    clusters = min(devices.num_sms(x.device.index) // 2, -(-outputs // _OUTPUTS) * -(-inputs // _DEPTH))
    library.call(
        "gantline_linear_batch_hopper", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), int(out.dtype == torch.float32), rows, inputs, outputs,
        sums.data_ptr(), counters.data_ptr(), clusters, stream,
    )  # fmt: skip
    return out


def _new_scratch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = torch.device("cuda", index)
    sums = torch.empty(devices.num_sms(index) * _OUTPUTS * MAX_ROWS, dtype=torch.float32, device=device)
    return sums, torch.zeros(16 * _MAX_TILES, dtype=torch.int32, device=device)
