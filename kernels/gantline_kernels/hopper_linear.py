"""Linear layers for few rows by `cuda_kernels/linear_hopper.cu`: which it takes, its scratch memory, its launch."""

from __future__ import annotations

import torch

from gantline_kernels import devices, library
from gantline_kernels.scratch import kept

__all__ = ["MAX_ROWS", "fits_hopper_linear", "hopper_linear"]

MAX_ROWS = 16
_OUTPUTS, _DEPTH = 128, 64
_MAX_TILES, _MAX_CHUNKS = 16384, 1 << 20
_TYPES = {torch.bfloat16: 0, torch.float16: 1}


def fits_hopper_linear(x: torch.Tensor, weight: torch.Tensor, max_rows: int = MAX_ROWS) -> bool:
    """Whether a kernel for `max_rows` can take these; the caller knows whether it is built, and the chip."""
    rows, (outputs, inputs) = x.shape[0], weight.shape
    if not 1 <= rows <= max_rows or x.dtype not in _TYPES or weight.dtype != x.dtype:
        return False
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    countable = outputs <= _MAX_TILES * _OUTPUTS and -(-outputs // _OUTPUTS) * -(-inputs // _DEPTH) <= _MAX_CHUNKS
    return aligned and countable and inputs > 0 and inputs % 8 == 0 and weight.is_contiguous()


def hopper_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None, *, blocks: int = 0
) -> torch.Tensor:
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N] in the type of x or `out_dtype`, for what `fits_hopper_linear`.

    `blocks` is for tuning; 0: one to each multiprocessor. Raises RuntimeError if a device's first call is captured (`scratch.py`).
    """
    rows, (outputs, inputs) = x.shape[0], weight.shape
    out = torch.empty((rows, outputs), dtype=out_dtype or x.dtype, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    sums, counters = kept(_new_scratch, x.device.index, stream)
    blocks = min(blocks or devices.num_sms(x.device.index), -(-outputs // _OUTPUTS) * -(-inputs // _DEPTH))
    library.call(
        "gantline_linear_hopper", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), int(out.dtype == torch.float32), rows, inputs, outputs, sums.data_ptr(), counters.data_ptr(), blocks, stream,
    )  # fmt: skip
    return out


def _new_scratch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = torch.device("cuda", index)
    sums = torch.empty(2 * devices.num_sms(index) * _OUTPUTS * MAX_ROWS, dtype=torch.float32, device=device)
    return sums, torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
