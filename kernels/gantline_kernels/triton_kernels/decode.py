# mypy: disable-error-code="no-untyped-def"
"""Attention of single queries over the paged cache ("flash decoding", https://pytorch.org/blog/flash-decoding/).

A program takes one sequence, one key/value head with all query heads that share it, and one part of the context; a second kernel joins
the parts. So every key and value is read once, and few long sequences still fill the GPU. The number of parts follows from host integers.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

__all__ = ["decode_attention"]

_LOG2_E = math.log2(math.e)
_PROGRAMS_PER_SM = 2
_MAX_PARTS = 128
_LEAST_PART = 64
_LEAST_PART_OF_MANY = 2048
"""Tokens of the shortest part worth a program of its own: where programs are few, and where there are enough without splitting."""
_SHARED_BYTES = 98304
"""Of the pipeline: chips between 8.0 and 9.0 have 99 KB a block."""


@triton.jit
def _decode(
    q, key_cache, value_cache, block_tables, context_lens, out, part_out, part_lse,
    scale, softcap, window, q_stride, table_stride, kv_heads, parts, least_tiles,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(context_lens + sequence)
    start = tl.maximum(length - window, 0) // TILE if WINDOW else 0
    per_part = tl.maximum(tl.cdiv(tl.cdiv(length, TILE) - start, parts), least_tiles)
    first = start + part * per_part
    last = tl.minimum(first + per_part, tl.cdiv(length, TILE))

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    heads = kv_heads * GROUP
    head = kv_head * GROUP + rows
    row_inside = rows < GROUP
    inside = row_inside[:, None] & (dims < DIM)[None, :]
    queries = tl.load(q + sequence * q_stride + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0)

    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    table = block_tables + sequence * table_stride
    for tile in range(first, last):
        at = tile * TILE + tl.arange(0, TILE)
        seen = at < length
        if TILE <= BLOCK_SIZE:
            block = tl.load(table + tile * TILE // BLOCK_SIZE).to(tl.int64)
            place = (block * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        else:
            blocks = tl.load(table + at // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            place = (blocks * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        loaded = seen[:, None] & (dims < DIM)[None, :]
        keys = tl.load(key_cache + place[:, None] * DIM + dims[None, :], mask=loaded, other=0.0)
        values = tl.load(value_cache + place[:, None] * DIM + dims[None, :], mask=loaded, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores * scale / softcap)) - 1.0) * 1.4426950408889634
        else:
            scores = scores * (scale * 1.4426950408889634)
        if WINDOW:
            seen = seen & (at >= length - window)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        top = new_top

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        place = (sequence * heads + head) * parts + part
        tl.store(part_lse + place, tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), -1e30), mask=row_inside)
        tl.store(part_out + place[:, None] * DIM + dims[None, :], result, mask=inside)
    else:
        target = out + (sequence * heads + head)[:, None] * DIM + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _join(part_out, part_lse, out, parts, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PARTS: tl.constexpr):
    """Average the parts of one query head by the weight of each."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    dims = tl.arange(0, DIM_PADDED)
    lse = tl.load(part_lse + row * parts + part, mask=part < parts, other=-1e30)
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    weights = tl.where(lse > -1e29, weights, 0.0)
    inside = (weights > 0)[:, None] & (dims < DIM)[None, :]
    values = tl.load(part_out + (row * parts + part)[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    result = tl.sum(values * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + row * DIM + dims, result.to(out.dtype.element_ty), mask=dims < DIM)


@cache
def _num_sms(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 4


def plan_parts(batch: int, kv_heads: int, max_context_len: int, num_sms: int) -> tuple[int, int]:
    """(parts of each context, least tokens of a part). Measured on an H200, docs/perf-log.md.

    Few programs are split until there are _PROGRAMS_PER_SM for each multiprocessor. Where there are enough, only what is long is split,
    so that a long context among short ones does not finish alone.
    """
    wanted = -(-num_sms * _PROGRAMS_PER_SM // (batch * kv_heads))
    least = _LEAST_PART if wanted > 1 else _LEAST_PART_OF_MANY
    most = -(-max_context_len // least)
    return max(1, min(wanted if wanted > 1 else most, most, _MAX_PARTS)), least


def decode_attention(
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
    parts: int = 0,
    tile: int = 0,
    num_warps: int = 0,
    num_stages: int = 0,
) -> None:
    """q [B, Hq, D] (heads packed) -> out [B, Hq, D] contiguous. `parts`, `tile` and what follows are for tuning; 0: chosen here."""
    batch, heads, dim = q.shape
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    seen = min(max_context_len, sliding_window) if sliding_window else max_context_len
    planned, least = plan_parts(batch, kv_heads, seen, _num_sms(q.device.index))
    parts, least = (parts, 1) if parts else (planned, least)
    group, dim_padded = heads // kv_heads, triton.next_power_of_2(dim)
    tile = tile or min(64 if dim <= 128 else 32, block_size if block_size >= 16 else 64)
    # Of five stages the pipeline gives two buffers to the tiles (a tile's address is itself loaded), of three one: enough where many
    # programs share a multiprocessor.
    tile_bytes = 2 * tile * dim_padded * key_cache.element_size()
    crowded = batch * kv_heads * parts > 3 * _num_sms(q.device.index) or 2 * tile_bytes > _SHARED_BYTES
    stages = num_stages or (3 if crowded else 5)
    warps = num_warps or (2 if tile_bytes <= 32768 else 4)
    split = parts > 1
    part_out = torch.empty((batch, heads, parts, dim), dtype=torch.float32, device=q.device) if split else out
    part_lse = torch.empty((batch, heads, parts), dtype=torch.float32, device=q.device) if split else out
    _decode[(parts, kv_heads, batch)](
        q, key_cache, value_cache, block_tables, context_lens, out, part_out, part_lse,
        scale, logit_softcap, sliding_window, q.stride(0), block_tables.stride(0), kv_heads, parts, max(1, least // tile),
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim, DIM_PADDED=dim_padded, BLOCK_SIZE=block_size,
        TILE=tile, SPLIT=split, SOFTCAP=logit_softcap > 0, WINDOW=sliding_window > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if split:
        _join[(batch * heads,)](
            part_out, part_lse, out, parts, DIM=dim, DIM_PADDED=dim_padded, PARTS=max(2, triton.next_power_of_2(parts)), num_warps=4
        )
