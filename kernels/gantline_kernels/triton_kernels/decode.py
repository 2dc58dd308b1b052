# mypy: disable-error-code="no-untyped-def"
"""Attention of single queries over the paged cache ("flash decoding", https://pytorch.org/blog/flash-decoding/).

A program takes one sequence, one key/value head with all query heads that share it, and one part of the context; a second kernel joins
the parts. So every key and value is read once, and few long sequences still fill the GPU. The number of parts follows from host integers.

What groups of sequences share (`shared_prefix.py`) is attended by a launch before, and is further parts here: where few, the program of a
sequence's own context takes them in at its end, otherwise the second kernel joins them with the others. On Hopper the two launches overlap
(programmatic dependent launch): the one before is bound by the matrix units, this one by memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from gantline_kernels import devices
from gantline_kernels.shared_prefix import SharedPrefixes
from gantline_kernels.triton_kernels.early import capability, launch_options
from gantline_kernels.triton_kernels.integers import next_power_of_2
from gantline_kernels.triton_kernels.shared_prefix import attend_shared_prefixes, plan_prefix

__all__ = ["DecodePlan", "decode_attention", "decode_variant", "plan_decode"]

_LOG2_E = math.log2(math.e)
_PROGRAMS_PER_SM = 2
_MAX_PARTS = 128
_LEAST_PART = 64
_LEAST_PART_OF_MANY = 2048
"""Tokens of the shortest part worth a program of its own: where programs are few, and where there are enough without splitting."""
_ALL_BUSY, _SHORT = 0.9, 1024
"""Share of multiprocessors that have a program, and tokens of a context, with which nothing is split."""
_MOST_TAKEN_IN = 4
"""Parts of a shared prefix that the program of a sequence's own context takes in one after the other."""
_SHARED_BYTES = 98304
"""Of the pipeline: chips between 8.0 and 9.0 have 99 KB a block."""


# What differs from batch to batch is not specialized on: each new mixture of alignments and divisors would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["window", "table_stride", "parts", "shared_parts", "least_tiles"],
    do_not_specialize_on_alignment=["block_tables", "context_lens", "shared_lens"],
)
def _decode(
    q, key_cache, value_cache, block_tables, context_lens, shared_lens, out, part_out, part_lse,
    scale, softcap, window, q_stride, table_stride, kv_heads, parts, shared_parts, least_tiles,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(context_lens + sequence)
    start = tl.maximum(length - window, 0) // TILE if WINDOW else 0
    if SHARED:
        start = tl.load(shared_lens + sequence) // TILE
    per_part = tl.maximum(tl.cdiv(tl.cdiv(length, TILE) - start, parts), least_tiles)
    first = start + part * per_part
    last = tl.minimum(first + per_part, tl.cdiv(length, TILE))

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    heads = kv_heads * GROUP
    head = kv_head * GROUP + rows
    row_inside = (rows < GROUP) & (length > 0)
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

    if EARLY:  # the pass over shared prefixes, which had waited for all before it, may still be running
        gdc_wait()
    if SHARED and not SPLIT:
        for earlier in range(tl.where(start > 0, shared_parts, 0)):
            place = (sequence * heads + head) * shared_parts + earlier
            lse = tl.load(part_lse + place, mask=row_inside, other=-1e30)
            mean = tl.load(part_out + place[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
            mean = tl.where((lse > -1e29)[:, None], mean, 0.0)  # nothing was written for an empty part
            new_top = tl.maximum(top, lse)
            weight = tl.where(lse > -1e29, tl.exp2(lse - new_top), 0.0)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + mean * weight[:, None]
            top = new_top
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        place = (sequence * heads + head) * (shared_parts + parts) + shared_parts + part
        tl.store(part_lse + place, tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), -1e30), mask=row_inside)
        if first < last:  # nobody reads an empty part's values
            tl.store(part_out + place[:, None] * DIM + dims[None, :], result, mask=inside)
    else:
        target = out + (sequence * heads + head)[:, None] * DIM + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts", "shared_parts"], do_not_specialize_on_alignment=["context_lens", "shared_lens"])
def _join(
    part_out, part_lse, context_lens, shared_lens, out, heads, parts, shared_parts,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Average the parts of one query head by the weight of each; the first `shared_parts` only where the sequence is in a group."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    dims = tl.arange(0, DIM_PADDED)
    known = part < parts
    if SHARED:
        known = known & ((part >= shared_parts) | (tl.load(shared_lens + row // heads) > 0))
    lse = tl.load(part_lse + row * parts + part, mask=known, other=-1e30)
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    weights = tl.where(lse > -1e29, weights, 0.0)
    inside = (weights > 0)[:, None] & (dims < DIM)[None, :]
    values = tl.load(part_out + (row * parts + part)[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    result = tl.sum(values * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    covered = tl.load(context_lens + row // heads) > 0
    tl.store(out + row * DIM + dims, result.to(out.dtype.element_ty), mask=(dims < DIM) & covered)


def plan_parts(batch: int, kv_heads: int, max_context_len: int, num_sms: int) -> tuple[int, int]:
    """(parts of each context, least tokens of a part). Measured on an H200, docs/perf-log.md.

    Few programs are split until there are _PROGRAMS_PER_SM for each multiprocessor, but for short contexts that occupy nearly all of them
    once: joining parts would take longer than it saves. Where there are enough, only what is long is split, so that a long context among
    short ones does not finish alone.
    """
    if _ALL_BUSY * num_sms <= batch * kv_heads <= num_sms and max_context_len <= _SHORT:
        return 1, _LEAST_PART
    wanted = -(-num_sms * _PROGRAMS_PER_SM // (batch * kv_heads))
    least = _LEAST_PART if wanted > 1 else _LEAST_PART_OF_MANY
    most = -(-max_context_len // least)
    return max(1, min(wanted if wanted > 1 else most, most, _MAX_PARTS)), least


@dataclass(frozen=True)
class DecodePlan:
    """How a batch is cut: parts of each sequence's own context, of at least so many tokens each; rows of a tile and parts of the shared
    prefixes (0: there are none); whether a second kernel joins the parts."""

    parts: int
    least: int
    shared_rows: int = 0
    shared_parts: int = 0
    joined: bool = False


@cache
def plan_decode(batch: int, heads: int, kv_heads: int, max_context_len: int, max_own_len: int | None, num_sms: int) -> DecodePlan:
    """`max_own_len` None: nothing is shared."""
    if max_own_len is None:
        parts, least = plan_parts(batch, kv_heads, max_context_len, num_sms)
        return DecodePlan(parts, least, joined=parts > 1)
    parts, least = plan_parts(batch, kv_heads, max_own_len, num_sms)
    rows, shared_parts = plan_prefix(batch * heads // kv_heads, kv_heads, max_context_len, num_sms)
    if parts > 1 or shared_parts > _MOST_TAKEN_IN:
        return DecodePlan(parts, least, rows, shared_parts, joined=True)
    return DecodePlan(parts, least, rows, min(2 * shared_parts, _MOST_TAKEN_IN))  # measured: two programs for each multiprocessor


def _tile(dim: int, block_size: int) -> int:
    """Tokens of a tile."""
    return min(64 if dim <= 128 else 32, block_size if block_size >= 16 else 64)


def _pipeline(programs: int, tile_bytes: int, num_sms: int) -> tuple[int, int]:
    """(warps, stages) for tiles of so many bytes of keys and values.

    Of five stages the pipeline gives two buffers to the tiles (a tile's address is itself loaded), of three one: enough where many
    programs share a multiprocessor.
    """
    crowded = programs > 3 * num_sms or 2 * tile_bytes > _SHARED_BYTES
    return (2 if tile_bytes <= 32768 else 4), (3 if crowded else 5)


def decode_variant(
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    element_size: int,
    block_size: int,
    max_context_len: int,
    max_own_len: int | None,
    num_sms: int,
) -> tuple[int, ...]:
    """What a batch's size and bounds decide about the kernels that attend it: batches for which it is the same share the compiled ones.

    As `decode_attention` calls them: `max_context_len` not above a sliding window, `max_own_len` None where nothing is shared.
    """
    plan = plan_decode(batch, heads, kv_heads, max_context_len, max_own_len, num_sms)
    tile_bytes = 2 * _tile(dim, block_size) * next_power_of_2(dim) * element_size
    joined_parts = next_power_of_2(plan.shared_parts + plan.parts) if plan.joined else 0
    return plan.shared_rows, joined_parts, *_pipeline(batch * kv_heads * plan.parts, tile_bytes, num_sms)


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
    shared: SharedPrefixes | None = None,
    *,
    plan: DecodePlan | None = None,
    tile: int = 0,
    num_warps: int = 0,
    num_stages: int = 0,
    early: bool | None = None,
) -> None:
    """q [B, Hq, D] (heads packed) -> out [B, Hq, D] contiguous; rows of sequences without context are left as they are.

    `plan`, `tile` and what follows are for tuning; None or 0: chosen here.
    """
    batch, heads, dim = q.shape
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    group, dim_padded, num_sms = heads // kv_heads, next_power_of_2(dim), devices.num_sms(q.device.index)
    seen = min(max_context_len, sliding_window) if sliding_window else max_context_len
    plan = plan or plan_decode(batch, heads, kv_heads, seen, None if shared is None else shared.max_own_len, num_sms)
    tile = tile or _tile(dim, block_size)
    warps, stages = _pipeline(batch * kv_heads * plan.parts, 2 * tile * dim_padded * key_cache.element_size(), num_sms)
    warps, stages = num_warps or warps, num_stages or stages
    all_parts = plan.shared_parts + (plan.parts if plan.joined else 0)
    part_out = torch.empty((batch, heads, all_parts, dim), dtype=torch.float32, device=q.device) if all_parts else out
    part_lse = torch.empty((batch, heads, all_parts), dtype=torch.float32, device=q.device) if all_parts else out
    shared_lens = context_lens if shared is None else shared.lens
    early = shared is not None and (capability(q.device) >= (9, 0) if early is None else early)
    if shared is not None:
        attend_shared_prefixes(
            q, key_cache, value_cache, block_tables, shared, part_out, part_lse, scale, logit_softcap,
            rows=plan.shared_rows, parts=plan.shared_parts, lead=early,
        )  # fmt: skip
    _decode[(plan.parts, kv_heads, batch)](
        q, key_cache, value_cache, block_tables, context_lens, shared_lens, out, part_out, part_lse,
        scale, logit_softcap, sliding_window, q.stride(0), block_tables.stride(0), kv_heads, plan.parts, plan.shared_parts,
        max(1, plan.least // tile),
        GROUP=group, ROWS=max(16, next_power_of_2(group)), DIM=dim, DIM_PADDED=dim_padded, BLOCK_SIZE=block_size,
        TILE=tile, SPLIT=plan.joined, SHARED=shared is not None, SOFTCAP=logit_softcap > 0, WINDOW=sliding_window > 0,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
        EARLY=early, **launch_options(early),
    )  # fmt: skip
    if plan.joined:
        _join[(batch * heads,)](
            part_out, part_lse, context_lens, shared_lens, out, heads, all_parts, plan.shared_parts,
            DIM=dim, DIM_PADDED=dim_padded, PARTS=max(2, next_power_of_2(all_parts)), SHARED=shared is not None,
            num_warps=4,
        )  # fmt: skip
