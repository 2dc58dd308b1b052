# mypy: disable-error-code="no-untyped-def"
"""Into how many parts chunks of prompts are cut over their keys, decided on the device, and the kernel that joins the parts ("flash
decoding", https://pytorch.org/blog/flash-decoding/, for many rows).

A tile of rows walks over tiles of keys; where tiles of rows do not fill the multiprocessors, or fill them unevenly, a part of so many tiles
of keys (`size`) is a program of its own. Every program comes to the same plan by itself, from the true lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["choose_size", "find_item", "join_parts", "load_sequences", "size_pointer"]


@triton.jit
def load_sequences(
    query_starts, context_lens, first_sequence, sequences, kv_heads, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Of each sequence [SEQUENCES]: tiles of rows in all heads, and the tiles of keys that one of them walks over at most."""
    i = tl.arange(0, SEQUENCES)
    there = i < sequences
    begin = tl.load(query_starts + first_sequence + i, mask=there, other=0)
    end = tl.load(query_starts + first_sequence + i + 1, mask=there, other=0)
    length = tl.load(context_lens + first_sequence + i, mask=there, other=0)
    tiles = tl.cdiv((end - begin) * GROUP, ROWS) * kv_heads
    steps = tl.cdiv(length, TILE)
    if WINDOW:
        steps = tl.minimum(steps, (window + (ROWS - 1) // GROUP + TILE - 1) // TILE + 1)
    return tiles, tl.where(tiles > 0, steps, 0)


@triton.jit
def choose_size(tiles, steps, slots, workers, MAX_PARTS: tl.constexpr):
    """Tiles of keys in a part: what takes `workers` programs at a time the shortest, as far as the parts have a place.

    Costs are in times of a tile of keys. Items longer than half a part count as whole ones, which are worked off in rounds; the others
    fill what the rounds leave.
    """
    longest = tl.maximum(tl.max(steps, axis=0), 1)
    count = tl.arange(0, MAX_PARTS) + 1
    size = tl.cdiv(longest, count)
    split = count > 1
    item = tl.where(split, 5, 3)  # what beginning and ending an item costs
    full = steps[None, :] // size[:, None]
    over = steps[None, :] - full * size[:, None]
    whole = tl.sum(tiles[None, :] * (full + (2 * over > size[:, None]).to(tl.int32)), axis=1)
    rest = tl.sum(tl.where((over > 0) & (2 * over <= size[:, None]), tiles[None, :] * (over + item[:, None]), 0), axis=1)
    needed = tl.sum(tl.where(steps[None, :] > size[:, None], tiles[None, :] * (full + (over > 0).to(tl.int32)), 0), axis=1)
    cost = tl.maximum(tl.cdiv(whole, workers) * (size + item), tl.cdiv(whole * (size + item) + rest, workers))
    cost = 8 * cost + tl.where(split, 32 + count, 0)  # joining
    cost = tl.where(split & (needed > slots), 1 << 30, cost)
    return tl.cdiv(longest, tl.argmin(cost, axis=0) + 1)


@triton.jit
def _at(x, i, local):
    return tl.sum(tl.where(i == local, x, 0), axis=0)


@triton.jit
def find_item(tiles, steps, size, kv_heads, program, SEQUENCES: tl.constexpr):
    """(sequence, key/value head, tile of rows, part, first slot of that tile's parts) of item `program`; sequence SEQUENCES: there is none.

    A sequence's items go through its heads, of each through the parts, of each through the tiles of rows from the last to the first; its
    slots through heads, tiles of rows, parts.
    """
    i = tl.arange(0, SEQUENCES)
    parts = tl.cdiv(steps, size)
    items = tiles * parts
    local = tl.sum((tl.cumsum(items, 0) <= program).to(tl.int32), axis=0)
    at = program - tl.sum(tl.where(i < local, items, 0), axis=0)
    first_slot = tl.sum(tl.where((i < local) & (parts > 1), items, 0), axis=0)
    of_head = tl.maximum(_at(tiles, i, local) // kv_heads, 1)
    parts_here = tl.maximum(_at(parts, i, local), 1)
    row_tile = of_head - 1 - at % of_head
    part = at // of_head % parts_here
    kv_head = at // of_head // parts_here
    return local, kv_head, row_tile, part, first_slot + (kv_head * of_head + row_tile) * parts_here


@triton.jit
def size_pointer(parts, slots, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Where the program 0 leaves the size for those that join."""
    return (parts + slots * (ROWS * (DIM + 1)) + 2).to(tl.pointer_type(tl.int32), bitcast=True)


# What differs from batch to batch is not specialized on: each new mixture of alignments and divisors would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["window", "slots", "first_sequence", "sequences"], do_not_specialize_on_alignment=["query_starts", "context_lens"]
)
def join_parts(
    query_starts, context_lens, out, parts, window, slots, kv_heads, first_sequence, sequences,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr, JOINED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Average the parts of JOINED rows at a time by the weight of each, AT_ONCE parts after AT_ONCE others."""
    tiles, steps = load_sequences(
        query_starts, context_lens, first_sequence, sequences, kv_heads, window, GROUP, ROWS, TILE, WINDOW, SEQUENCES
    )
    i = tl.arange(0, SEQUENCES)
    size = tl.load(size_pointer(parts, slots, ROWS, DIM))
    counts = tl.cdiv(steps, size)
    split = tl.where(counts > 1, tiles, 0)
    ends = tl.cumsum(split, 0)
    units = tl.sum(split, axis=0) * (ROWS // JOINED)
    dims = tl.arange(0, DIM_PADDED)
    logs = parts + slots * (ROWS * DIM)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        index = unit // (ROWS // JOINED)
        local = tl.sum((ends <= index).to(tl.int32), axis=0)
        index -= tl.sum(tl.where(i < local, split, 0), axis=0)
        of_head = _at(tiles, i, local) // kv_heads
        kv_head = index // of_head
        first_row = index % of_head * ROWS
        sequence = first_sequence + local
        begin = tl.load(query_starts + sequence)
        num_queries = tl.load(query_starts + sequence + 1) - begin
        before = tl.load(context_lens + sequence) - num_queries
        first = 0
        if WINDOW:
            first = tl.maximum(before + first_row // GROUP - window + 1, 0) // TILE
        last = tl.minimum(before + (first_row + ROWS - 1) // GROUP, before + num_queries - 1) // TILE
        own = tl.cdiv(last - first + 1, size)
        slot = tl.sum(tl.where((i < local) & (counts > 1), tiles * counts, 0), axis=0) + index * _at(counts, i, local)
        rows = unit % (ROWS // JOINED) * JOINED + tl.arange(0, JOINED)
        query = (first_row + rows) // GROUP
        there = (query < num_queries) & (own > 1)  # a tile in one part is in the output already
        top = tl.full([JOINED], -1e30, tl.float32)
        total = tl.zeros([JOINED], tl.float32)
        acc = tl.zeros([JOINED, DIM_PADDED], tl.float32)
        for first_part in range(0, tl.where(own > 1, own, 0), AT_ONCE):
            part = first_part + tl.arange(0, AT_ONCE)
            inside = (part < own)[:, None] & there[None, :]
            place = (slot + part)[:, None].to(tl.int64) * ROWS + rows[None, :]
            log = tl.load(logs + place, mask=inside, other=-1e30)
            columns = inside[:, :, None] & (dims < DIM)[None, None, :]
            means = tl.load(parts + place[:, :, None] * DIM + dims[None, None, :], mask=columns, other=0.0)
            new_top = tl.maximum(top, tl.max(log, axis=0))
            weights = tl.where(log > -1e29, tl.exp2(log - new_top[None, :]), 0.0)
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, axis=0)
            acc = acc * shrink[:, None] + tl.sum(means * weights[:, :, None], axis=0)
            top = new_top
        head = kv_head * GROUP + (first_row + rows) % GROUP
        target = out + ((begin + query).to(tl.int64) * (kv_heads * GROUP) + head)[:, None] * DIM + dims[None, :]
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(target, result.to(out.dtype.element_ty), mask=there[:, None] & (dims < DIM)[None, :])
