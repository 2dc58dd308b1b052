"""Linear layers for few rows by `cuda_kernels/linear_few_rows.cu`, from compute capability 8.0 on: which it takes, its launches."""

from __future__ import annotations

import torch

from gantline_kernels import devices, library
from gantline_kernels.triton_kernels.early import capability

__all__ = ["MAX_ROWS", "few_rows_gated_linear", "few_rows_linear", "fits_few_rows_linear", "has_few_rows_linear"]

MAX_ROWS = 16
_TYPES = {torch.bfloat16: 0, torch.float16: 1}
_AMPERE, _HOPPER = (8, 0), (9, 0)


def fits_few_rows_linear(x: torch.Tensor, weight: torch.Tensor, max_rows: int = MAX_ROWS) -> bool:
    """Whether x [T, K] and weight [N, K] are 16-bit floats in rows of whole 16 bytes, T at most `max_rows`: what our kernels of linear
    layers ask for. The caller knows whether they are built, and the chip."""
    rows, inputs = x.shape[0], weight.shape[1]
    if not 1 <= rows <= max_rows or x.dtype not in _TYPES or weight.dtype != x.dtype:
        return False
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and inputs > 0 and inputs % 8 == 0 and weight.is_contiguous()


def has_few_rows_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes these, and is to on this GPU; the caller knows whether it is built. (Hopper: one row is Triton's.)"""
    chip = capability(x.device)
    return fits_few_rows_linear(x, weight) and chip >= _AMPERE and (x.shape[0] > 1 or chip != _HOPPER)


def few_rows_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None = None,
    *,
    blocks: int = 0,
    early: bool | None = None,
) -> torch.Tensor:
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N] in the type of x or `out_dtype`, for what `fits_few_rows_linear`.

    Up to 8 rows, and from 9 on, a row's bits do not depend on how many there are. `blocks` and `early` are for tuning; 0: one to each
    multiprocessor; None: on Hopper.
    """
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype, device=x.device)
    _launch(x, weight, bias, out, gated=False, blocks=blocks, early=early)
    return out


def few_rows_gated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, blocks: int = 0, early: bool | None = None
) -> torch.Tensor:
    """silu(gate) * up -> [T, I] in the type of x, of gate, then up = x [T, K] @ weight [2 I, K]^T + bias [2 I]; else as above."""
    rows, outputs = x.shape[0], weight.shape[0]
    # As much memory as where gate and up meet it, though nothing is written there: what a step takes must not hinge on how its rows divide.
    gate_and_up = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    out = torch.empty((rows, outputs // 2), dtype=x.dtype, device=x.device)
    del gate_and_up
    _launch(x, weight, bias, out, gated=True, blocks=blocks, early=early)
    return out


def _launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, *, gated: bool, blocks: int, early: bool | None
) -> None:
    early = capability(x.device) == _HOPPER if early is None else early
    library.call(
        "gantline_linear_few_rows", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), out.data_ptr(), int(out.dtype == torch.float32), *x.shape, out.shape[1],
        gated, blocks or devices.num_sms(x.device.index), early, torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
