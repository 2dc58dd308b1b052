# mypy: disable-error-code="no-untyped-def"
"""AWQ's `gemm` layout: unpacked to a plain matrix, or multiplied with a few rows directly.

Column c of eight lies in bits 4 * (0, 4, 1, 5, 2, 6, 3, 7)[c] of its word, which is 4 * (c // 2 + c % 2 * 4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gantline_kernels.triton_kernels.integers import cdiv

__all__ = ["awq_dequantize", "awq_linear"]

_MAX_DIRECT_ROWS = 32
"""Past so many rows, unpacking once and a plain product cost less."""


@triton.jit
def _unpack_tile(qweight, qzeros, scales, rows, columns, inside, outputs, group_size):
    shift = (columns % 8) // 2 * 4 + columns % 2 * 16
    words, group = outputs // 8, rows // group_size
    word = columns // 8
    packed = tl.load(qweight + rows[:, None] * words + word[None, :], mask=inside, other=0)
    zero = tl.load(qzeros + group[:, None] * words + word[None, :], mask=inside, other=0)
    factor = tl.load(scales + group[:, None] * outputs + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    value = ((packed >> shift[None, :]) & 15) - ((zero >> shift[None, :]) & 15)
    return value.to(tl.float32) * factor


@triton.jit
def _dequantize(qweight, qzeros, scales, out, inputs, outputs, group_size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < inputs)[:, None] & (columns < outputs)[None, :]
    value = _unpack_tile(qweight, qzeros, scales, rows, columns, inside, outputs, group_size)
    tl.store(out + rows[:, None] * outputs + columns[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear(
    x, qweight, qzeros, scales, bias, out, count, inputs, outputs, group_size, x_stride,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inputs, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + rows[:, None].to(tl.int64) * x_stride + depth[None, :], mask=(rows < count)[:, None] & (depth < inputs)[None, :], other=0.0
        )
        inside = (depth < inputs)[:, None] & (columns < outputs)[None, :]
        right = _unpack_tile(qweight, qzeros, scales, depth.to(tl.int64), columns, inside, outputs, group_size)
        right = right.to(scales.dtype.element_ty).to(left.dtype)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)[None, :]
    target = out + rows[:, None].to(tl.int64) * outputs + columns[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(rows < count)[:, None] & (columns < outputs)[None, :])


def awq_dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    qweight, qzeros, scales = qweight.contiguous(), qzeros.contiguous(), scales.contiguous()
    inputs, outputs = qweight.shape[0], scales.shape[1]
    out = torch.empty((inputs, outputs), dtype=scales.dtype, device=scales.device)
    columns = 256
    _dequantize[(cdiv(inputs, 16), cdiv(outputs, columns))](
        qweight, qzeros, scales, out, inputs, outputs, group_size, ROWS=16, COLUMNS=columns
    )
    return out


def awq_linear(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    rows, inputs = x.shape
    if rows > _MAX_DIRECT_ROWS:
        out = torch.mm(x, awq_dequantize(qweight, qzeros, scales, group_size).to(x.dtype))
        return out if bias is None else out.add_(bias)
    qweight, qzeros, scales = qweight.contiguous(), qzeros.contiguous(), scales.contiguous()
    outputs = scales.shape[1]
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if rows:
        columns = 32
        _linear[(cdiv(outputs, columns), cdiv(rows, 16))](
            x, qweight, qzeros, scales, bias, out, rows, inputs, outputs, group_size, x.stride(0),
            BIAS=bias is not None, ROWS=16, COLUMNS=columns, DEPTH=64,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
