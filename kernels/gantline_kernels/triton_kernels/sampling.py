# mypy: disable-error-code="no-untyped-def"
"""Choosing tokens: the largest logit in two launches, a random one within limits in one.

Limits are found without sorting. A float's bits, mapped so that larger floats have larger integers, are a 32-bit key; the least key that
is kept is found four bits at a time, by the count (top-k) or the mass (top-p) of the keys in each of sixteen ranges. Each takes eight
passes over a row, which then lies in the second-level cache; rows without that limit skip them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["argmax", "sample"]

_PART = 16384


@triton.jit
def _argmax_parts(logits, part_value, part_index, stride, size, parts, PART: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(part * PART, tl.minimum(part * PART + PART, size), BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + at, mask=at < size, other=-float("inf")).to(tl.float32)
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, at, where)
    top = tl.max(best, axis=0)
    first = tl.min(tl.where(best == top, where, 2147483647), axis=0)
    tl.store(part_value + row * parts + part, top)
    tl.store(part_index + row * parts + part, first)


@triton.jit
def _argmax_join(part_value, part_index, out, size, parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    value = tl.load(part_value + row * parts + part, mask=part < parts, other=-float("inf"))
    index = tl.load(part_index + row * parts + part, mask=part < parts, other=2147483647)
    first = tl.min(tl.where(value == tl.max(value, axis=0), index, 2147483647), axis=0)
    tl.store(out + row, tl.minimum(first, size - 1).to(tl.int64))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    part = min(_PART, triton.next_power_of_2(size))
    parts = triton.cdiv(size, part)
    value = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    block = min(4096, part)
    _argmax_parts[(rows, parts)](logits, value, index, logits.stride(0), size, parts, PART=part, BLOCK=block, num_warps=4)
    _argmax_join[(rows,)](value, index, out, size, parts, PARTS=max(2, triton.next_power_of_2(parts)), num_warps=1)
    return out


@triton.jit
def _key(value):
    """Integers in the order of the floats (no NaN): int64, 0 to 2^32 - 1."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _least_key(row, size, top, inverse, least, limit, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key such that the keys above its sixteenth's floor, from `least` on, number (or weigh) `limit` or more."""
    digits = tl.arange(0, 16)
    prefix = tl.zeros([], tl.int64)
    above = tl.zeros([], tl.float32)
    for step in range(8):
        shift = 28 - 4 * step
        found = tl.zeros([16], tl.float32)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
            key = _key(value)
            counts = (at < size) & (key >= least) & ((key >> (shift + 4)) == (prefix >> (shift + 4)))
            weight = tl.exp(value * inverse - top) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            digit = (key >> shift) & 15
            found += tl.sum(tl.where(counts[:, None] & (digit[:, None] == digits[None, :]), weight[:, None], 0.0), axis=0)
        # the highest digit at which what lies above, and itself, reach the limit; rounding may leave none: the lowest that is there
        from_digit = tl.sum(tl.where(digits[None, :] >= digits[:, None], found[None, :], 0.0), axis=1) + above
        reached = tl.max(tl.where((from_digit >= limit) & (found > 0), digits, -1), axis=0)
        lowest = tl.min(tl.where(found > 0, digits, 15), axis=0)
        digit = tl.where(reached >= 0, reached, lowest)
        above += tl.sum(tl.where(digits > digit, found, 0.0), axis=0)
        prefix += digit.to(tl.int64) << shift
    return prefix


@triton.jit
def _mass(row, size, top, inverse, least, BLOCK: tl.constexpr):
    """Sum of the weights of keys from `least` on: in float32 by lanes, over blocks."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
        total += tl.where((at < size) & (_key(value) >= least), tl.exp(value * inverse - top), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _sample(
    logits, uniforms, temperatures, top_ks, top_ps, min_ps, out, stride, size,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    row = logits + line * stride
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
        where = tl.where(value > best, at, where)
        best = tl.maximum(best, value)
    top_logit = tl.max(best, axis=0)
    chosen = tl.min(tl.where(best == top_logit, where, 2147483647), axis=0)
    temperature = tl.load(temperatures + line)
    if temperature > 0:
        inverse = 1.0 / temperature
        top = top_logit * inverse
        least = tl.zeros([], tl.int64)
        if TOP_K:
            top_k = tl.load(top_ks + line)
            if (top_k > 0) & (top_k < size):
                least = _least_key(row, size, top, inverse, least, top_k.to(tl.float32), False, NARROW)
        if TOP_P:
            top_p = tl.load(top_ps + line)
            if top_p < 1:
                goal = top_p * _mass(row, size, top, inverse, least, BLOCK)
                least = _least_key(row, size, top, inverse, least, goal, True, NARROW)
        if MIN_P:
            floor = tl.load(min_ps + line)
            if floor > 0:
                least = tl.maximum(least, _key(top_logit + tl.log(floor) * temperature))
        least = tl.minimum(least, _key(top_logit))
        goal = tl.load(uniforms + line) * _mass(row, size, top, inverse, least, BLOCK)
        chosen = _first_beyond(row, size, top, inverse, least, goal, BLOCK)
    tl.store(out + line, tl.minimum(chosen, size - 1).to(tl.int64))


@triton.jit
def _first_beyond(row, size, top, inverse, least, goal, BLOCK: tl.constexpr):
    """The first token at which the kept weights' running sum exceeds `goal`; the last kept one if rounding leaves none."""
    before = tl.zeros([], tl.float32)
    chosen = tl.full([], 2147483647, tl.int32)
    last = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
        kept = (at < size) & (_key(value) >= least) & (value > -float("inf"))
        weight = tl.where(kept, tl.exp(value * inverse - top), 0.0)
        running = before + tl.cumsum(weight, axis=0)
        chosen = tl.minimum(chosen, tl.min(tl.where(kept & (running > goal), at, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(kept, at, 0), axis=0))
        before += tl.sum(weight, axis=0)
    return tl.where(chosen == 2147483647, last, chosen)


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        block = min(4096, max(16, triton.next_power_of_2(size)))
        _sample[(rows,)](
            logits, uniforms, temperature, top_k, top_p, min_p, out, logits.stride(0), size,
            TOP_K=top_k is not None, TOP_P=top_p is not None, MIN_P=min_p is not None, BLOCK=block, NARROW=min(1024, block), num_warps=8,
        )  # fmt: skip
    return out
