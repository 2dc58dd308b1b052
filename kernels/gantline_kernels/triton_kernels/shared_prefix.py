# mypy: disable-error-code="no-untyped-def"
"""Attention of single queries of many sequences over the blocks that their contexts begin with alike ("cascade" or "prefix" attention:
https://arxiv.org/abs/2402.05099).

The queries of a group, and of the query heads that share a key/value head, are the rows of one tile, as chunks of a prompt are in
`prefill.py`, whose loop this uses without its mask. So a prefix is read once for ROWS / GROUP sequences, and by the matrix units. Each
part of a prefix leaves a mean of its values and the logarithm of its weight; `decode.py`, which attends what each sequence has for itself,
takes them in as parts of the whole.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from gantline_kernels.shared_prefix import SharedPrefixes
from gantline_kernels.triton_kernels.integers import next_power_of_2
from gantline_kernels.triton_kernels.prefill import _attend_tile, _can_use_tma, _descriptor, tile_sizes

__all__ = ["attend_shared_prefixes", "plan_prefix"]

_PROGRAMS_PER_SM = 1
_MAX_PARTS = 32
_MOST_ROWS = 64
"""Of a tile: with 128 the accumulators no longer fit the registers."""
_LEAST_PART = 128
"""Tokens of the shortest part worth a program of its own."""


# What differs from batch to batch is not specialized on: each new mixture of alignments and divisors would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["table_stride", "groups", "parts", "all_parts", "least_tiles"],
    do_not_specialize_on_alignment=["block_tables", "shared_lens", "members", "group_starts"],
)
def _shared_prefix(
    q, key_cache, value_cache, block_tables, shared_lens, members, group_starts, part_out, part_lse,
    scale, softcap, q_stride, table_stride, kv_heads, groups, parts, all_parts, least_tiles,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    if LEAD:
        gdc_launch_dependents()
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    program = tl.program_id(2)
    low = 0
    high = groups
    while high - low > 1:  # the last group whose first program is not after this one
        middle = (low + high) // 2
        begins = tl.load(group_starts + middle) * GROUP // ROWS + middle
        if begins <= program:
            low = middle
        else:
            high = middle
    begin = tl.load(group_starts + low)
    num_rows = (tl.load(group_starts + low + 1) - begin) * GROUP
    first_row = (program - (begin * GROUP // ROWS + low)) * ROWS
    if first_row < num_rows:
        rows = first_row + tl.arange(0, ROWS)
        dims = tl.arange(0, DIM_PADDED)
        row_inside = rows < num_rows
        sequence = tl.load(members + begin + rows // GROUP, mask=row_inside, other=0).to(tl.int64)
        head = kv_head * GROUP + rows % GROUP
        inside = row_inside[:, None] & (dims < DIM)[None, :]
        queries = tl.load(q + sequence[:, None] * q_stride + head[:, None] * DIM + dims[None, :], mask=inside, other=0.0)

        leader = tl.load(members + begin).to(tl.int64)
        table = block_tables + leader * table_stride
        length = tl.load(shared_lens + leader)
        tiles = length // TILE
        per_part = tl.maximum(tl.cdiv(tiles, parts), least_tiles)
        first = part * per_part
        last = tl.minimum(first + per_part, tiles)
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
        for tile in range(first, last):
            acc, top, total = _attend_tile(
                queries, acc, top, total, tile, rows, length, table, key_cache, value_cache, kv_head, kv_heads, dims,
                scale, softcap, 0, False, DIM, BLOCK_SIZE, TILE, SOFTCAP, False, TMA, PRECISION,
            )  # fmt: skip
        weight = tl.where(total > 0, total, 1.0)
        place = (sequence * (kv_heads * GROUP) + head) * all_parts + part
        tl.store(part_lse + place, tl.where(total > 0, top + tl.log2(weight), -1e30), mask=row_inside)
        if first < last:  # nobody reads an empty part's values
            tl.store(part_out + place[:, None] * DIM + dims[None, :], acc / weight[:, None], mask=inside)


@cache
def plan_prefix(rows_of_all: int, kv_heads: int, max_prefix_len: int, num_sms: int) -> tuple[int, int]:
    """(rows of a tile, parts of each prefix), for `rows_of_all` rows of one key/value head, as if all were in one group."""
    rows = max(16, min(_MOST_ROWS, next_power_of_2(rows_of_all)))
    programs = -(-rows_of_all // rows) * kv_heads
    most = max(1, max_prefix_len // _LEAST_PART)
    return rows, max(1, min(num_sms * _PROGRAMS_PER_SM // programs, most, _MAX_PARTS))


def attend_shared_prefixes(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    shared: SharedPrefixes,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    scale: float,
    logit_softcap: float,
    *,
    rows: int,
    parts: int,
    lead: bool = False,
    tile: int = 0,
    num_warps: int = 0,
    num_stages: int = 0,
    tma: bool | None = None,
) -> None:
    """Fill parts 0 to `parts` of part_out float32 [N, Hq, P, D] and part_lse float32 [N, Hq, P] for sequences in a group: means, and
    logarithms to the base 2 of sums of weights (-1e30 of none, whose mean is undefined). Those of others are left as they are.

    q [N, Hq, D] (heads packed). `lead`: the next launch may start at once; it must wait for this one before it reads what this one writes.
    `rows` of a tile at most. `tile` and what follows are for tuning; 0 or None: chosen here.
    """
    batch, heads, dim = q.shape
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    group, dim_padded = heads // kv_heads, next_power_of_2(dim)
    most_rows, chosen_tile = tile_sizes(dim, q.dtype)
    rows, tile = min(rows, most_rows), tile or min(chosen_tile, block_size)
    use_tma = _can_use_tma(q, dim, tile, block_size) if tma is None else tma
    keys, values = (_descriptor(cache, tile) if use_tma else cache for cache in (key_cache, value_cache))
    programs = batch * group // rows + shared.num_groups
    _shared_prefix[(parts, kv_heads, programs)](
        q, keys, values, block_tables, shared.lens, shared.members, shared.starts, part_out, part_lse,
        scale, logit_softcap, q.stride(0), block_tables.stride(0), kv_heads,
        shared.num_groups, parts, part_lse.shape[2], _LEAST_PART // tile,
        GROUP=group, ROWS=rows, DIM=dim, DIM_PADDED=dim_padded, BLOCK_SIZE=block_size, TILE=tile,
        SOFTCAP=logit_softcap > 0, TMA=use_tma, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=num_warps or (4 if dim <= 128 else 8), num_stages=num_stages or 2,
        LEAD=lead,
    )  # fmt: skip
