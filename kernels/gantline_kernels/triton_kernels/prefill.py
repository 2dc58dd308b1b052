# mypy: disable-error-code="no-untyped-def"
"""Causal attention of chunks of prompts over the paged cache (https://arxiv.org/abs/2307.08691, the loop; ours, the packing).

A program takes ROWS rows of one sequence and one key/value head, a row being a query and one of the query heads that share the head: so
short chunks still fill the rows, and each key is read once for all of them. Programs find their sequence by bisection, since only an
upper bound of their number is known on the host. Long programs come first, so that the last ones to finish are short. Where tiles of rows
may be too few to fill the GPU, each may be cut into parts over the keys (`prefill_plan.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gantline_kernels import devices, prefill_split
from gantline_kernels.prefill_split import MAX_PARTS, MAX_SEQUENCES
from gantline_kernels.triton_kernels.integers import next_power_of_2
from gantline_kernels.triton_kernels.prefill_plan import choose_size, find_item, join_parts, load_sequences, size_pointer

__all__ = ["prefill_attention", "tile_sizes"]

_PROGRAMS_PER_SM = 2
_JOINING_PER_SM = 4


@triton.jit
def _attend_tile(
    queries, acc, top, total, tile, position, length, table, key_cache, value_cache, kv_head, kv_heads, dims, scale, softcap, window,
    MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    at = tile * TILE + tl.arange(0, TILE)
    if TMA:
        row = (tl.load(table + tile * TILE // BLOCK_SIZE) * kv_heads + kv_head) * BLOCK_SIZE + (tile * TILE) % BLOCK_SIZE
        keys = key_cache.load([row, 0])
        values = value_cache.load([row, 0])
    else:
        seen = at < length
        if TILE <= BLOCK_SIZE:
            block = tl.load(table + tile * TILE // BLOCK_SIZE).to(tl.int64)
            place = (block * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        else:
            blocks = tl.load(table + at // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
            place = (blocks * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE
        if MASKED:
            loaded = seen[:, None] & (dims < DIM)[None, :]
        else:
            loaded = (dims < DIM)[None, :]
        keys = tl.load(key_cache + place[:, None] * DIM + dims[None, :], mask=loaded, other=0.0)
        values = tl.load(value_cache + place[:, None] * DIM + dims[None, :], mask=loaded, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if SOFTCAP:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores * scale / softcap)) - 1.0) * 1.4426950408889634
        factor = 1.0
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
    weights = tl.exp2(scores * factor - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, new_top, total


# What differs from batch to batch is not specialized on: each new mixture of alignments and divisors would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["window", "table_stride", "first_sequence", "sequences", "slots", "workers"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lens"],
)
def _prefill(
    q, key_cache, value_cache, block_tables, query_starts, context_lens, out, parts,
    scale, softcap, window, q_stride, table_stride, kv_heads, first_sequence, sequences, slots, workers,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, SEQUENCES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = 0
    slot = 0
    size = 1 << 30
    if SPLIT:
        tiles, steps = load_sequences(
            query_starts, context_lens, first_sequence, sequences, kv_heads, window, GROUP, ROWS, TILE, WINDOW, SEQUENCES
        )
        size = choose_size(tiles, steps, slots, workers, PARTS)
        if tl.program_id(0) == 0:
            tl.store(size_pointer(parts, slots, ROWS, DIM), size)
        low, kv_head, row_tile, part, slot = find_item(tiles, steps, size, kv_heads, tl.program_id(0), SEQUENCES)
        sequence = first_sequence + tl.minimum(low, sequences - 1)
        first_row = row_tile * ROWS
        begin = tl.load(query_starts + sequence)
    else:
        program = tl.num_programs(0) - 1 - tl.program_id(0)
        kv_head = tl.program_id(1)
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
        begin = tl.load(query_starts + sequence)
        first_row = (program - ((begin - origin) * GROUP // ROWS + low)) * ROWS
    num_queries = tl.load(query_starts + sequence + 1) - begin
    length = tl.load(context_lens + sequence)
    first_position = length - num_queries + first_row // GROUP
    last_position = tl.minimum(length - num_queries + (first_row + ROWS - 1) // GROUP, length - 1)
    end = last_position // TILE + 1
    full_end = (first_position + 1) // TILE
    start = 0
    if WINDOW:
        start = tl.maximum(first_position - window + 1, 0) // TILE
        full_end = start
    cut = end - start > size
    if SPLIT:
        start += part * size
        end = tl.minimum(end, start + size)
    if (low < sequences) & (first_row < num_queries * GROUP) & (start < end):
        rows = first_row + tl.arange(0, ROWS)
        dims = tl.arange(0, DIM_PADDED)
        query = rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        position = length - num_queries + query
        inside = (query < num_queries)[:, None] & (dims < DIM)[None, :]
        token = (begin + query).to(tl.int64)
        queries = tl.load(q + token[:, None] * q_stride + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
        table = block_tables + sequence.to(tl.int64) * table_stride
        for tile in range(start, tl.minimum(full_end, end)):
            acc, top, total = _attend_tile(
                queries, acc, top, total, tile, position, length, table, key_cache, value_cache, kv_head, kv_heads, dims,
                scale, softcap, window, False, DIM, BLOCK_SIZE, TILE, SOFTCAP, WINDOW, TMA, PRECISION,
            )  # fmt: skip
        for tile in range(tl.maximum(full_end, start), end):
            acc, top, total = _attend_tile(
                queries, acc, top, total, tile, position, length, table, key_cache, value_cache, kv_head, kv_heads, dims,
                scale, softcap, window, True, DIM, BLOCK_SIZE, TILE, SOFTCAP, WINDOW, TMA, PRECISION,
            )  # fmt: skip
        weight = tl.where(total > 0, total, 1.0)
        result = acc / weight[:, None]
        if SPLIT:
            place = (slot + part) * ROWS + tl.arange(0, ROWS)
            log = tl.where(total > 0, top + tl.log2(weight), -1e30)
            tl.store(parts + place[:, None] * DIM + dims[None, :], result, mask=inside & cut)
            tl.store(parts + slots * (ROWS * DIM) + place, log, mask=(query < num_queries) & cut)
            inside = inside & (cut == 0)
        target = out + (token * (kv_heads * GROUP) + head)[:, None] * DIM + dims[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    max_context_len: int,
    first_sequence: int,
    sliding_window: int,
    logit_softcap: float,
    *,
    rows: int = 0,
    tile: int = 0,
    num_warps: int = 0,
    num_stages: int = 0,
    tma: bool | None = None,
) -> None:
    """q, out [T, Hq, D] (heads packed): the sequences from `first_sequence` on, each of any number of queries, even none.

    `rows`, `tile` and what follows are for tuning; 0 or None: chosen here.
    """
    tokens, heads, dim = q.shape
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    group, dim_padded = heads // kv_heads, next_power_of_2(dim)
    sequences = context_lens.shape[0] - first_sequence
    chosen_rows, chosen_tile = tile_sizes(dim, q.dtype)
    rows, tile = rows or chosen_rows, tile or min(chosen_tile, block_size)
    use_tma = _can_use_tma(q, dim, tile, block_size) if tma is None else tma
    keys, values = (_descriptor(cache, tile) if use_tma else cache for cache in (key_cache, value_cache))
    tiles, num_sms = tokens * group // rows, devices.num_sms(q.device.index)
    seen = min(max_context_len, sliding_window + rows) if sliding_window else max_context_len
    slots = prefill_split.num_slots(sequences, kv_heads * tiles, seen, num_sms)
    parts = prefill_split.new_parts(slots, rows, dim, q.device) if slots else out
    programs = tiles + sequences  # of the sequences before, not all need have a query
    sizes = {"GROUP": group, "ROWS": rows, "DIM": dim, "DIM_PADDED": dim_padded, "TILE": tile, "WINDOW": sliding_window > 0}
    _prefill[(programs * kv_heads + slots, 1) if slots else (programs, kv_heads)](
        q, keys, values, block_tables, query_starts, context_lens, out, parts,
        scale, logit_softcap, sliding_window, q.stride(0), block_tables.stride(0), kv_heads, first_sequence, sequences, slots,
        _PROGRAMS_PER_SM * num_sms,
        **sizes, BLOCK_SIZE=block_size, SOFTCAP=logit_softcap > 0, TMA=use_tma, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SPLIT=slots > 0, SEQUENCES=MAX_SEQUENCES, PARTS=MAX_PARTS,
        num_warps=num_warps or (4 if dim <= 128 else 8), num_stages=num_stages or 2,
    )  # fmt: skip
    if slots:
        join_parts[(_JOINING_PER_SM * num_sms,)](
            query_starts, context_lens, out, parts, sliding_window, slots, kv_heads, first_sequence, sequences,
            **sizes, SEQUENCES=MAX_SEQUENCES, JOINED=4, AT_ONCE=8, num_warps=4,
        )  # fmt: skip


def tile_sizes(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, keys at a time) of a program, with which it keeps within 99 KB of shared memory: chips between 8.0 and 9.0, and of 12.0, have
    no more."""
    if dtype == torch.float32:
        return (64, 32) if dim <= 128 else (32, 16)
    return (128, 64) if dim <= 128 else (64, 32)


def _can_use_tma(q: torch.Tensor, dim: int, tile: int, block_size: int) -> bool:
    """Whether tiles can come by the copy engine of Hopper and newer: whole rows of a power of two, no tile across two blocks."""
    if not q.is_cuda or torch.version.hip or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    return dim & (dim - 1) == 0 and 64 <= dim <= 256 and tile <= block_size and q.dtype != torch.float32


def _descriptor(cache: torch.Tensor, tile: int):
    from triton.tools.tensor_descriptor import TensorDescriptor

    dim = cache.shape[3]
    return TensorDescriptor(cache, [cache.numel() // dim, dim], [dim, 1], [tile, dim])
