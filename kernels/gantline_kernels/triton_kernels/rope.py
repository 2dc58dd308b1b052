# mypy: disable-error-code="no-untyped-def"
"""Queries and keys normed and rotated, keys and values written to the cache, in one launch.

A program takes a few heads of one token: first the programs of queries, then those of keys, then those of values. Small launches may
start before the kernel ahead of them ends (`early.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gantline_kernels.triton_kernels.early import early_mode, launch_options, launched
from gantline_kernels.triton_kernels.integers import cdiv, next_power_of_2

__all__ = ["rope_and_cache_write"]

_HEADS_PER_PROGRAM = 4
_PAIRS_PER_WARP = 256
_MAX_WARPS = 4


@triton.jit
def _norm_halves(first, second, weight, at, inside, half, eps):
    """RMS norm over both halves of each row."""
    mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * half)
    factor = tl.rsqrt(mean + eps)[:, None]
    gain_first = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    gain_second = tl.load(weight + half + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    return first * factor * gain_first, second * factor * gain_second


@triton.jit
def _rotated(row, angles, weight, at, inside, half, eps, NORM: tl.constexpr):
    """Both halves, float32, of heads at `row` ([heads, HALF] of pointers), normed if asked for, then rotated."""
    first = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        first, second = _norm_halves(first, second, weight, at, at < half, half, eps)
    cos = tl.load(angles + at, mask=at < half, other=0.0)[None, :]
    sin = tl.load(angles + half + at, mask=at < half, other=0.0)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_halves(target, first, second, inside, half):
    tl.store(target, first.to(target.dtype.element_ty), mask=inside)
    tl.store(target + half, second.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])  # parts of a packed batch: they lie differently in each
def _rope_and_cache_write(
    q, k, v, out, cos_sin, positions, key_cache, value_cache, slots, q_weight, k_weight,
    q_stride, k_stride, v_stride, heads, kv_heads, half, block_size, eps,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, EARLY: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    if EARLY:  # in this order for decode attention's sake: see early.py
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups = tl.cdiv(heads, HEADS)
    key_groups = tl.cdiv(kv_heads, HEADS)
    is_query = group < query_groups
    is_key = (group >= query_groups) & (group < query_groups + key_groups)
    before = tl.where(is_query, 0, tl.where(is_key, query_groups, query_groups + key_groups))
    head = (group - before) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    dim = 2 * half
    columns = head[:, None] * dim + at[None, :]
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * dim
    slot = tl.load(slots + token)
    place = ((slot // block_size) * kv_heads + head[:, None]) * block_size + slot % block_size
    cached = ((head < kv_heads) & (slot >= 0))[:, None] & (at < half)[None, :]
    if is_query:
        inside = (head < heads)[:, None] & (at < half)[None, :]
        first_q, second_q = _rotated(q + token * q_stride + columns, angles, q_weight, at, inside, half, eps, NORM_Q)
        _store_halves(out + token * heads * dim + columns, first_q, second_q, inside, half)
    elif is_key:
        first_k, second_k = _rotated(k + token * k_stride + columns, angles, k_weight, at, cached, half, eps, NORM_K)
        _store_halves(key_cache + place * dim + at[None, :], first_k, second_k, cached, half)
    else:
        row = v + token * v_stride + columns
        first_v = tl.load(row, mask=cached, other=0.0)
        second_v = tl.load(row + half, mask=cached, other=0.0)
        _store_halves(value_cache + place * dim + at[None, :], first_v, second_v, cached, half)


def rope_and_cache_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    *,
    early: int | None = None,
) -> torch.Tensor:
    """`early`: see `early.early_mode`; None: by the launch's size."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    q, k, v = (_with_packed_heads(x) for x in (q, k, v))
    out = q.new_empty((tokens, heads, dim))
    if tokens:
        per_program = min(_HEADS_PER_PROGRAM, next_power_of_2(max(heads, kv_heads)))
        grid = (tokens, cdiv(heads, per_program) + 2 * cdiv(kv_heads, per_program))
        half = next_power_of_2(dim // 2)
        early = early_mode(q.device, grid[0] * grid[1], tokens) if early is None else early
        kernel = _rope_and_cache_write[grid](
            q, k, v, out, cos_sin, positions, key_cache, value_cache, slots, q_norm_weight, k_norm_weight,
            q.stride(0), k.stride(0), v.stride(0), heads, kv_heads, dim // 2, key_cache.shape[2], eps,
            NORM_Q=q_norm_weight is not None, NORM_K=k_norm_weight is not None, EARLY=early, HEADS=per_program, HALF=half,
            num_warps=max(1, min(_MAX_WARPS, per_program * half // _PAIRS_PER_WARP)), **launch_options(early),
        )  # fmt: skip
        launched(kernel, early)
    return out


def _with_packed_heads(x: torch.Tensor) -> torch.Tensor:
    """Heads of a token side by side; tokens may be any distance apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
