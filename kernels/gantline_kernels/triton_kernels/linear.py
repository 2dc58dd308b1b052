# mypy: disable-error-code="no-untyped-def"
"""Linear layers for a single row, bound by reading the weights once.

A program takes four outputs and goes along the inputs with all its weights of 4 KB a row at once: long stretches of memory, loaded
straight into registers, with no barrier between a load and its use. The matrix units have nothing to add. A launch of few programs, of
which beginning and end are a large part, may start before the kernel ahead of it ends (programmatic dependent launch, Hopper and newer):
it asks for its first weights, which depend on nothing, and then waits. Block sizes and what was tried besides: docs/perf-log.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gantline_kernels.triton_kernels.early import capability, launch_options, starts_early
from gantline_kernels.triton_kernels.integers import cdiv

__all__ = ["has_one_row_linear", "one_row_linear"]

_OUTPUTS, _DEPTH, _WARPS = 4, 2048, 4
_HOPPER = (9, 0)


@triton.jit
def _one_row(
    x, weight, bias, out, inputs, outputs,
    BIAS: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_row = weight + tl.minimum(columns, outputs - 1)[:, None].to(tl.int64) * inputs
    if EARLY:
        gdc_launch_dependents()
        lines = weight_row + tl.minimum(tl.arange(0, DEPTH // 64) * 64, inputs - 1)[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
        gdc_wait()
    acc = tl.zeros([OUTPUTS, DEPTH], tl.float32)
    for start in range(0, inputs, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        if EVEN:
            left = tl.load(weight_row + depth[None, :], eviction_policy="evict_first")
            right = tl.load(x + depth)
        else:
            left = tl.load(weight_row + depth[None, :], mask=(depth < inputs)[None, :], other=0.0, eviction_policy="evict_first")
            right = tl.load(x + depth, mask=depth < inputs, other=0.0)
        acc += left.to(tl.float32) * right.to(tl.float32)[None, :]
    total = tl.sum(acc, axis=1)
    if BIAS:
        total += tl.load(bias + columns, mask=columns < outputs, other=0.0).to(tl.float32)
    tl.store(out + columns, total.to(out.dtype.element_ty), mask=columns < outputs)


def has_one_row_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `one_row_linear` takes these, on a GPU where it was measured to be the fastest."""
    if x.shape[0] != 1 or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return False
    return weight.is_contiguous() and weight.shape[1] % 16 == 0 and x.stride(1) == 1 and capability(x.device) == _HOPPER


def one_row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None = None,
    *,
    outputs_each: int = _OUTPUTS,
    depth: int = _DEPTH,
    warps: int = _WARPS,
    early: bool | None = None,
) -> torch.Tensor:
    """x [1, K] @ weight [N, K]^T + bias [N] -> [1, N] in the type of x or `out_dtype`, accumulated in float32; weight contiguous.

    `outputs_each` (of a program) and what follows are for tuning. `early` needs Hopper or newer; None: chosen here.
    """
    outputs, inputs = weight.shape
    out = torch.empty((1, outputs), dtype=out_dtype or x.dtype, device=x.device)
    programs = cdiv(outputs, outputs_each)
    if early is None:
        early = starts_early(x.device, programs)
    _one_row[(programs,)](
        x, weight, x if bias is None else bias, out, inputs, outputs,
        BIAS=bias is not None, EVEN=inputs % depth == 0, EARLY=early, OUTPUTS=outputs_each, DEPTH=depth,
        num_warps=warps, **launch_options(early),
    )  # fmt: skip
    return out
