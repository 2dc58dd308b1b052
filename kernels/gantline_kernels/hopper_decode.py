"""Decode attention by `cuda_kernels/decode_hopper.cu`: which it takes, how their contexts are cut, its launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from gantline_kernels import devices, library
from gantline_kernels.scratch import kept

__all__ = ["AFTER_WAIT", "HopperDecodePlan", "fits_hopper_decode", "hopper_decode", "plan_hopper_decode"]

_TYPES = {torch.bfloat16: 0, torch.float16: 1}
_DIMS = (64, 96, 128, 256)
_MAX_GROUP = 16
_MAX_PARTS = 128
_MAX_PAIRS = 4096
"""Sequences times key/value heads, for each of which there is a counter."""
_LEAST_PART = 128
"""Tokens of the shortest part: a tile for each of eight warps."""
_LONGEST_PART = 4096
"""Tokens that a block may have to itself where others have less: a long context among short ones must not finish alone."""
_BETTER_LATE = {4, 5, *range(17, 25)}
"""Numbers of sequences of which a step is faster if the linear layer behind attention does not start meanwhile. Of that layer for 17 to 24
rows two blocks fit on a multiprocessor: they would crowd on those that attention has left (docs/perf-log.md)."""
_NOT_EARLY, _AT_ONCE, AFTER_WAIT = 0, 1, 2
"""When the kernel behind may start; AFTER_WAIT: once all ahead of this one has ended, for a kernel that needs nothing of this one."""


@dataclass(frozen=True)
class HopperDecodePlan:
    """At most so many parts of each context, of at least so many tokens; warps of a block."""

    parts: int
    least: int
    warps: int


@cache
def plan_hopper_decode(batch: int, kv_heads: int, dim: int, max_context_len: int, num_sms: int) -> HopperDecodePlan:
    """One block to each multiprocessor, for which it takes nearly all shared memory; more of them only where lengths may differ much."""
    parts, least = max(1, num_sms // (batch * kv_heads)), _LEAST_PART
    if batch > 1 and max_context_len > _LONGEST_PART * parts:
        parts, least = -(-max_context_len // _LONGEST_PART), _LONGEST_PART
    if parts > _MAX_PARTS:
        parts, least = _MAX_PARTS, -(-max_context_len // _MAX_PARTS)
    return HopperDecodePlan(max(1, min(parts, -(-max_context_len // least))), least, 8 if dim <= 128 else 4)


def fits_hopper_decode(q: torch.Tensor, key_cache: torch.Tensor) -> bool:
    """Whether the kernel can take these and is the better one; the caller knows whether it is built, and the chip."""
    (batch, heads, dim), (_, kv_heads, block_size, _) = q.shape, key_cache.shape
    possible = q.dtype in _TYPES and key_cache.dtype == q.dtype and dim in _DIMS and heads // kv_heads <= _MAX_GROUP
    aligned = q.stride(0) % 8 == 0 and q.data_ptr() % 16 == 0 and block_size >= 16 and block_size & (block_size - 1) == 0
    return possible and aligned and batch * kv_heads <= _MAX_PAIRS


def hopper_decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    max_context_len: int,
    sliding_window: int,
    logit_softcap: float,
    *,
    plan: HopperDecodePlan | None = None,
    early: int | None = None,
) -> None:
    """q [B, Hq, D] (heads packed) -> out [B, Hq, D] contiguous, for what `fits_hopper_decode`; rows without context are left as they are.

    `plan` is for tuning; `early`: see AFTER_WAIT, None: chosen. Raises RuntimeError if a device's first call is captured (`scratch.py`).
    """
    batch, heads, dim = q.shape
    _, kv_heads, block_size, _ = key_cache.shape
    seen = min(max_context_len, sliding_window) if sliding_window else max_context_len
    plan = plan or plan_hopper_decode(batch, kv_heads, dim, seen, devices.num_sms(q.device.index))
    stream = torch.cuda.current_stream(q.device).cuda_stream
    counters = kept(_new_counters, q.device.index, stream)
    if early is None:
        early = _NOT_EARLY if batch in _BETTER_LATE else _AT_ONCE
    means, sums = 0, 0
    if plan.parts > 1:
        parts = torch.empty(batch * heads * plan.parts * (dim + 2), dtype=torch.float32, device=q.device)
        means = parts.data_ptr()
        sums = means + 4 * batch * heads * plan.parts * dim
    library.call(
        "gantline_decode_hopper", _TYPES[q.dtype], q.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), block_tables.data_ptr(),
        context_lens.data_ptr(), out.data_ptr(), means, sums, counters.data_ptr(), q.stride(0), block_tables.stride(0),
        block_tables.shape[1], batch, heads, kv_heads, dim, block_size.bit_length() - 1, sliding_window, max_context_len,
        plan.parts, plan.least, plan.warps, scale, logit_softcap, early, stream,
    )  # fmt: skip


def _new_counters(index: int) -> torch.Tensor:
    return torch.zeros(_MAX_PAIRS, dtype=torch.int32, device=f"cuda:{index}")
