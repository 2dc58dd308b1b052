# mypy: disable-error-code="no-untyped-def"
"""Attention over the paged cache whose rows do not depend on the batch: one kernel for prompts and for single queries.

A context is gone through in pieces of `PIECE` tokens, counted from its beginning, and a piece in tiles of fixed size, with a running
maximum and sum; the pieces' results are joined one after the other. Where a query sees nothing of a tile or of a piece, that leaves its
row as it is, bit for bit: so it does not matter which queries a program has beside it. A program goes through all pieces of its queries,
or, for single queries with long contexts, through one, and a second kernel joins them in the same order by the same arithmetic.

Sums and products that a compiler might contract one way here and another way there are written as fused ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gantline_kernels.triton_kernels.integers import cdiv, next_power_of_2
from gantline_kernels.triton_kernels.prefill import _can_use_tma, _descriptor

__all__ = ["PIECE", "invariant_attention"]

PIECE = 1024
"""Tokens: a multiple of every tile."""


@triton.jit
def _attend_tile(
    queries, acc, top, total, tile, position, length, table, key_cache, value_cache, kv_head, kv_heads, dims, scale, softcap, window,
    MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`MASKED` False: every row sees the whole tile."""
    at = tile * TILE + tl.arange(0, TILE)
    if TMA:
        row = (tl.load(table + tile * TILE // BLOCK_SIZE) * kv_heads + kv_head) * BLOCK_SIZE + (tile * TILE) % BLOCK_SIZE
        keys = key_cache.load([row, 0])
        values = value_cache.load([row, 0])
    else:
        if TILE <= BLOCK_SIZE:
            block = tl.load(table + tile * TILE // BLOCK_SIZE).to(tl.int64)
            place = (block * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        else:
            blocks = tl.load(table + at // BLOCK_SIZE, mask=at < length, other=0).to(tl.int64)
            place = (blocks * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        loaded = (dims < DIM)[None, :]
        if MASKED:
            loaded = loaded & (at < length)[:, None]
        keys = tl.load(key_cache + place[:, None] * DIM + dims[None, :], mask=loaded, other=0.0)
        values = tl.load(value_cache + place[:, None] * DIM + dims[None, :], mask=loaded, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if SOFTCAP:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores * scale / softcap)) - 1.0)
        factor = 1.4426950408889634
    else:
        factor = scale * 1.4426950408889634
    if MASKED:
        hidden = at[None, :] > position[:, None]
        if WINDOW:
            hidden = hidden | (at[None, :] <= position[:, None] - window)
        scores = tl.where(hidden, -float("inf"), scores)
        if TMA:  # past the sequence's end the block may hold anything, and 0 * NaN is NaN
            values = tl.where((at < length)[:, None], values, 0.0)
    new_top = tl.maximum(top, tl.max(scores, axis=1) * factor)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, factor, tl.float32), tl.broadcast_to(-new_top[:, None], scores.shape)))
    shrink = tl.exp2(top - new_top)
    total = tl.fma(total, shrink, tl.sum(weights, axis=1))
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _times_rows(x, factor, plus):
    """x [R, D] * factor [R] + plus [R, D], rounded once."""
    return tl.fma(x, tl.broadcast_to(factor[:, None], x.shape), plus)


@triton.jit
def _join(joined, joined_top, joined_total, acc, top, total):
    """What was joined before, and one more piece: sums of weighted values [R, D], largest scores [R], sums of weights [R]."""
    new_top = tl.maximum(joined_top, top)
    shrink = tl.exp2(joined_top - new_top)
    weight = tl.exp2(top - new_top)
    return _times_rows(joined, shrink, acc * weight[:, None]), new_top, tl.fma(joined_total, shrink, total * weight)


@triton.jit
def _mean(joined, joined_total):
    return joined / tl.where(joined_total > 0, joined_total, 1.0)[:, None]


# What differs from batch to batch is not specialized on: all launches for a model are one compiled kernel.
@triton.jit(
    do_not_specialize=["window", "table_stride", "first_sequence", "sequences", "single", "max_pieces"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lens"],
)
def _invariant_attention(
    q, key_cache, value_cache, block_tables, query_starts, context_lens, out, part_out, part_state,
    scale, softcap, window, q_stride, table_stride, kv_heads, first_sequence, sequences, single, max_pieces,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, PIECE_TILES: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`single`: each sequence has one query at most. With `max_pieces` above 1 a program has one piece, and longer contexts go to
    part_out [sequences, heads, max_pieces, DIM] and part_state [sequences, heads, max_pieces, 2], of maximum and sum."""
    kv_head = tl.program_id(1)
    if single:
        row_tiles = tl.cdiv(GROUP, ROWS)
        sequence = first_sequence + tl.program_id(0) // row_tiles
        first_row = tl.program_id(0) % row_tiles * ROWS
    else:
        program = tl.num_programs(0) - 1 - tl.program_id(0)
        origin = tl.load(query_starts + first_sequence)
        low = 0
        high = sequences
        while high - low > 1:  # the last sequence whose first program is not after this one
            middle = (low + high) // 2
            begins = (tl.load(query_starts + first_sequence + middle) - origin) * GROUP // ROWS + middle
            if begins <= program:
                low = middle
            else:
                high = middle
        sequence = first_sequence + low
        first_row = (program - ((tl.load(query_starts + sequence) - origin) * GROUP // ROWS + low)) * ROWS
    begin = tl.load(query_starts + sequence)
    num_queries = tl.load(query_starts + sequence + 1) - begin
    length = tl.load(context_lens + sequence)
    first_position = length - num_queries + first_row // GROUP
    last_position = tl.minimum(length - num_queries + (first_row + ROWS - 1) // GROUP, length - 1)
    end = last_position // TILE + 1
    start = 0
    full_end = (first_position + 1) // TILE
    if WINDOW:
        start = tl.maximum(first_position - window + 1, 0) // TILE
        full_end = 0
    first_piece = start // PIECE_TILES
    last_piece = tl.cdiv(end, PIECE_TILES)
    split = (max_pieces > 1) & (last_piece > 1)
    if max_pieces > 1:
        first_piece = tl.maximum(first_piece, tl.program_id(2))
        last_piece = tl.minimum(last_piece, tl.program_id(2) + 1)
    if (first_row < num_queries * GROUP) & (first_piece < last_piece):
        rows = first_row + tl.arange(0, ROWS)
        dims = tl.arange(0, DIM_PADDED)
        query = rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        position = length - num_queries + query
        row_inside = query < num_queries
        inside = row_inside[:, None] & (dims < DIM)[None, :]
        token = (begin + query).to(tl.int64)
        queries = tl.load(q + token[:, None] * q_stride + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        table = block_tables + sequence.to(tl.int64) * table_stride

        joined_top = tl.full([ROWS], -1e30, tl.float32)
        joined_total = tl.zeros([ROWS], tl.float32)
        joined = tl.zeros([ROWS, DIM_PADDED], tl.float32)
        for piece in range(first_piece, last_piece):
            top = tl.full([ROWS], -1e30, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
            piece_start = tl.maximum(start, piece * PIECE_TILES)
            piece_end = tl.minimum(end, (piece + 1) * PIECE_TILES)
            piece_full_end = tl.maximum(piece_start, tl.minimum(full_end, piece_end))
            for tile in range(piece_start, piece_full_end):
                acc, top, total = _attend_tile(
                    queries, acc, top, total, tile, position, length, table, key_cache, value_cache, kv_head, kv_heads, dims,
                    scale, softcap, window, False, DIM, BLOCK_SIZE, TILE, SOFTCAP, WINDOW, TMA, PRECISION,
                )  # fmt: skip
            for tile in range(piece_full_end, piece_end):
                acc, top, total = _attend_tile(
                    queries, acc, top, total, tile, position, length, table, key_cache, value_cache, kv_head, kv_heads, dims,
                    scale, softcap, window, True, DIM, BLOCK_SIZE, TILE, SOFTCAP, WINDOW, TMA, PRECISION,
                )  # fmt: skip
            joined, joined_top, joined_total = _join(joined, joined_top, joined_total, acc, top, total)
        if split:
            place = (sequence.to(tl.int64) * (kv_heads * GROUP) + head) * max_pieces + first_piece
            tl.store(part_state + 2 * place, joined_top, mask=row_inside)
            tl.store(part_state + 2 * place + 1, joined_total, mask=row_inside)
            tl.store(part_out + place[:, None] * DIM + dims[None, :], joined, mask=inside)
        else:
            target = out + (token * (kv_heads * GROUP) + head)[:, None] * DIM + dims[None, :]
            tl.store(target, _mean(joined, joined_total).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["window", "max_pieces"], do_not_specialize_on_alignment=["context_lens"])
def _join_pieces(
    part_out, part_state, context_lens, out, heads, window, max_pieces,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PIECE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Single queries whose contexts have several pieces; sequence i is token i."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(context_lens + row // heads)
    pieces = tl.cdiv(length, PIECE)
    if pieces > 1:
        first = 0
        if WINDOW:
            first = tl.maximum(length - window, 0) // PIECE
        dims = tl.arange(0, DIM_PADDED)
        one = tl.arange(0, 1)
        joined_top = tl.full([1], -1e30, tl.float32)
        joined_total = tl.zeros([1], tl.float32)
        joined = tl.zeros([1, DIM_PADDED], tl.float32)
        for piece in range(first, pieces):
            place = row * max_pieces + piece + one
            top = tl.load(part_state + 2 * place)
            total = tl.load(part_state + 2 * place + 1)
            acc = tl.load(part_out + place[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
            joined, joined_top, joined_total = _join(joined, joined_top, joined_total, acc, top, total)
        target = out + (row + one)[:, None] * DIM + dims[None, :]
        tl.store(target, _mean(joined, joined_total).to(out.dtype.element_ty), mask=(dims < DIM)[None, :])


def invariant_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    num_decodes: int,
    max_context_len: int,
    sliding_window: int,
    logit_softcap: float,
    *,
    rows: int = 0,
    tile: int = 0,
    num_warps: int = 0,
    num_stages: int = 0,
    tma: bool | None = None,
) -> None:
    """q, out [T, Hq, D], heads packed. `rows` and what follows are for tuning; 0 or None: chosen here, by the model alone."""
    tokens, heads, dim = q.shape
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    group, wide = heads // kv_heads, q.dtype == torch.float32
    rows = rows or (16 if wide else 64)
    tile = tile or min(64 if dim <= 128 and not wide else 32, block_size)
    use_tma = _can_use_tma(q, dim, tile, block_size) if tma is None else tma
    keys, values = (_descriptor(cache, tile) if use_tma else cache for cache in (key_cache, value_cache))
    pieces = cdiv(max_context_len, PIECE) if num_decodes else 1
    options = {
        "GROUP": group, "ROWS": rows, "DIM": dim, "DIM_PADDED": next_power_of_2(dim), "BLOCK_SIZE": block_size, "TILE": tile,
        "PIECE_TILES": PIECE // tile, "SOFTCAP": logit_softcap > 0, "WINDOW": sliding_window > 0, "TMA": use_tma,
        "PRECISION": "ieee" if wide else "tf32", "num_warps": num_warps or (4 if dim <= 128 else 8), "num_stages": num_stages or 2,
    }  # fmt: skip
    inputs = (q, keys, values, block_tables, query_starts, context_lens, out)
    numbers = (scale, logit_softcap, sliding_window, q.stride(0), block_tables.stride(0), kv_heads)
    parts = num_decodes * heads * pieces if pieces > 1 else 1
    part_out = torch.empty(parts * dim, dtype=torch.float32, device=q.device)
    part_state = torch.empty(2 * parts, dtype=torch.float32, device=q.device)
    if num_decodes:
        grid = (num_decodes * cdiv(group, rows), kv_heads, pieces)
        _invariant_attention[grid](*inputs, part_out, part_state, *numbers, 0, num_decodes, 1, pieces, **options)
        if pieces > 1:
            _join_pieces[(num_decodes * heads,)](
                part_out, part_state, context_lens, out, heads, sliding_window, pieces,
                DIM=dim, DIM_PADDED=options["DIM_PADDED"], PIECE=PIECE, WINDOW=sliding_window > 0, num_warps=1,
            )  # fmt: skip
    sequences = len(context_lens) - num_decodes
    if sequences:
        grid = (tokens * group // rows + sequences, kv_heads, 1)
        _invariant_attention[grid](*inputs, part_out, part_state, *numbers, num_decodes, sequences, 0, 1, **options)
