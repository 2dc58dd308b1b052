# mypy: disable-error-code="no-untyped-def"
"""Queries and keys normed and rotated, keys and values written to the cache, in one launch.

A program takes a few heads of one token: first the programs of queries, then those of keys, then those of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["rope_and_cache_write"]

_HEADS_PER_PROGRAM = 8


@triton.jit
def _norm_halves(first, second, weight, at, inside, half, eps):
    """RMS norm over both halves of each row."""
    mean = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * half)
    factor = tl.rsqrt(mean + eps)[:, None]
    gain_first = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    gain_second = tl.load(weight + half + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    return first * factor * gain_first, second * factor * gain_second


@triton.jit
def _rope_and_cache_write(
    q, k, v, out, cos_sin, positions, key_cache, value_cache, slots, q_weight, k_weight,
    q_stride, k_stride, v_stride, heads, kv_heads, half, block_size, eps,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    query_groups = tl.cdiv(heads, HEADS)
    key_groups = tl.cdiv(kv_heads, HEADS)
    at = tl.arange(0, HALF)
    dim = 2 * half
    if group < query_groups:
        head = group * HEADS + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (at < half)[None, :]
        row = q + token * q_stride + head[:, None] * dim + at[None, :]
        first = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(row + half, mask=inside, other=0.0).to(tl.float32)
        if NORM_Q:
            first, second = _norm_halves(first, second, q_weight, at, at < half, half, eps)
        angles = cos_sin + tl.load(positions + token).to(tl.int64) * dim + at
        cos = tl.load(angles, mask=at < half, other=0.0)[None, :]
        sin = tl.load(angles + half, mask=at < half, other=0.0)[None, :]
        target = out + token * heads * dim + head[:, None] * dim + at[None, :]
        tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
        tl.store(target + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        is_key = group < query_groups + key_groups
        first_group = tl.where(is_key, query_groups, query_groups + key_groups)
        head = (group - first_group) * HEADS + tl.arange(0, HEADS)
        inside = ((head < kv_heads) & (slot >= 0))[:, None] & (at < half)[None, :]
        place = ((slot // block_size) * kv_heads + head[:, None]) * block_size + slot % block_size
        target = place * dim + at[None, :]
        if is_key:
            row = k + token * k_stride + head[:, None] * dim + at[None, :]
            first = tl.load(row, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(row + half, mask=inside, other=0.0).to(tl.float32)
            if NORM_K:
                first, second = _norm_halves(first, second, k_weight, at, at < half, half, eps)
            angles = cos_sin + tl.load(positions + token).to(tl.int64) * dim + at
            cos = tl.load(angles, mask=at < half, other=0.0)[None, :]
            sin = tl.load(angles + half, mask=at < half, other=0.0)[None, :]
            tl.store(key_cache + target, (first * cos - second * sin).to(key_cache.dtype.element_ty), mask=inside)
            tl.store(key_cache + target + half, (second * cos + first * sin).to(key_cache.dtype.element_ty), mask=inside)
        else:
            row = v + token * v_stride + head[:, None] * dim + at[None, :]
            value = tl.load(row, mask=inside, other=0.0)
            tl.store(value_cache + target, value.to(value_cache.dtype.element_ty), mask=inside)
            value = tl.load(row + half, mask=inside, other=0.0)
            tl.store(value_cache + target + half, value.to(value_cache.dtype.element_ty), mask=inside)


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
) -> torch.Tensor:
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    q, k, v = (_with_packed_heads(x) for x in (q, k, v))
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens:
        per_program = min(_HEADS_PER_PROGRAM, triton.next_power_of_2(max(heads, kv_heads)))
        grid = (tokens, triton.cdiv(heads, per_program) + 2 * triton.cdiv(kv_heads, per_program))
        half = triton.next_power_of_2(dim // 2)
        _rope_and_cache_write[grid](
            q, k, v, out, cos_sin, positions, key_cache, value_cache, slots, q_norm_weight, k_norm_weight,
            q.stride(0), k.stride(0), v.stride(0), heads, kv_heads, dim // 2, key_cache.shape[2], eps,
            NORM_Q=q_norm_weight is not None, NORM_K=k_norm_weight is not None, HEADS=per_program, HALF=half,
            num_warps=max(1, min(4, per_program * half // 256)),
        )  # fmt: skip
    return out


def _with_packed_heads(x: torch.Tensor) -> torch.Tensor:
    """Heads of a token side by side; tokens may be any distance apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
