# mypy: disable-error-code="no-untyped-def"
"""The logarithm of each row's sum of exponentials, by one program to a row whatever their number and place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gantline_kernels.triton_kernels.integers import next_power_of_2

__all__ = ["logsumexp"]


# Not specialized: how a row lies in memory must not decide on the order of its sum.
@triton.jit(do_not_specialize=["stride"], do_not_specialize_on_alignment=["logits"])
def _logsumexp(logits, out, stride, size, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * stride
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32))
    top = tl.max(best, axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32) - top)
    tl.store(out + tl.program_id(0), top + tl.log(tl.sum(total, axis=0)))


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """logits [S, V], elements of a row side by side -> float32 [S]."""
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _logsumexp[(rows,)](logits, out, logits.stride(0), size, BLOCK=min(4096, max(16, next_power_of_2(size))), num_warps=8)
    return out
