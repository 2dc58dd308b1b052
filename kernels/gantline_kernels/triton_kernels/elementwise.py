# mypy: disable-error-code="no-untyped-def"
"""Norms and the gated activation. Bound by memory: each input is read once, each output written once, one program to a row.

Small ones, which a launch's cost is most of, may start before the kernel ahead of them ends (`early.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gantline_kernels.triton_kernels.early import early_mode, launch_options, launched
from gantline_kernels.triton_kernels.integers import cdiv, next_power_of_2

__all__ = ["MAX_EARLY_ACTIVATIONS", "add_rms_norm", "rms_norm", "silu_and_mul"]

MAX_EARLY_ACTIVATIONS = 24
"""Of the activation, whose programs are many: with more of them the linear layers on both sides no longer find room beside each other."""


@triton.jit
def _rms_norm(
    x, residual, weight, out, x_stride, residual_stride, size, eps, ADD: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if ADD:
        total = value.to(tl.float32) + tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
        value = total.to(x.dtype.element_ty)
        tl.store(residual + row * residual_stride + at, value, mask=inside)
    wide = value.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    tl.store(out + row * size + at, (wide * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, early: int | None = None) -> torch.Tensor:
    """`early`, here and below: see `early.early_mode`; None: by the launch's size."""
    out = x.new_empty(x.shape)
    _launch_norm(x, None, weight, out, eps, early)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, early: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum takes the place of `residual`."""
    out = x.new_empty(x.shape)
    _launch_norm(x, residual, weight, out, eps, early)
    return out, residual


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor, eps: float, early: int | None
) -> None:
    rows, size = x.shape
    if not rows:
        return
    block = next_power_of_2(size)
    stride = 0 if residual is None else residual.stride(0)
    early = early_mode(x.device, rows, rows) if early is None else early
    kernel = _rms_norm[(rows,)](
        x, residual, weight, out, x.stride(0), stride, size, eps,
        ADD=residual is not None, EARLY=early, BLOCK=block, num_warps=_warps(block), **launch_options(early),
    )  # fmt: skip
    launched(kernel, early)


def _warps(block: int) -> int:
    """So that a thread holds 16 elements: two loads of 16 bytes in flight."""
    return max(1, min(16, block // 512))


@triton.jit
def _silu_and_mul(x, out, x_stride, size, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_and_mul(x: torch.Tensor, *, early: int | None = None) -> torch.Tensor:
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, size))
    if rows:
        block = min(2048, next_power_of_2(size))
        grid = (rows, cdiv(size, block))
        early = early_mode(x.device, grid[0] * grid[1], rows, max_rows=MAX_EARLY_ACTIVATIONS) if early is None else early
        kernel = _silu_and_mul[grid](
            x, out, x.stride(0), size, EARLY=early, BLOCK=block, num_warps=max(1, min(4, block // 512)), **launch_options(early)
        )
        launched(kernel, early)
    return out
