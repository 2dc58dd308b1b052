# mypy: disable-error-code="no-untyped-def"
"""Choosing tokens: the largest logit in two launches, a random one within limits in one.

Limits are found without sorting. Each becomes the least logit that is kept: the largest value such that what is not below it numbers k
(top-k) or weighs p of the whole (top-p). One pass over the row, with sixteen thresholds from the least logit to the largest at once, tells
in which sixteenth that value lies; a second one gathers the logits of that sixteenth; few passes over these find it exactly, four bits of
its key at a time. (A key is a float's bits, mapped so that larger floats have larger integers.) Rows without a limit skip its passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gantline_kernels.triton_kernels.early import early_mode, launch_options, launched
from gantline_kernels.triton_kernels.integers import cdiv, next_power_of_2

__all__ = ["argmax", "sample"]

_PART = 16384
_SCRATCH = 32768
"""Logits of one sixteenth that are gathered; where there are more, the whole row is read again instead."""


@triton.jit
def _argmax_parts(logits, part_value, part_index, stride, size, parts, EARLY: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
def _argmax_join(part_value, part_index, out, size, parts, EARLY: tl.constexpr, PARTS: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
    part = min(_PART, next_power_of_2(size))
    parts = cdiv(size, part)
    value = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    block = min(4096, part)
    early = early_mode(logits.device, rows * parts, rows)
    kernel = _argmax_parts[(rows, parts)](
        logits, value, index, logits.stride(0), size, parts, EARLY=early, PART=part, BLOCK=block, num_warps=4, **launch_options(early)
    )
    launched(kernel, early)
    kernel = _argmax_join[(rows,)](
        value, index, out, size, parts, EARLY=early, PARTS=max(2, next_power_of_2(parts)), num_warps=1, **launch_options(early)
    )
    launched(kernel, early)
    return out


@triton.jit
def _key(value):
    """Integers in the order of the floats (no NaN): int64, 0 to 2^32 - 1."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _value(key):
    """The float of a key."""
    bits = (key - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights_from(source, size, thresholds, low, high, inverse, top, BY_MASS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """[16]: number or weight of the elements in [low, high) that are not below each threshold (floats, or keys)."""
    sums = tl.zeros([BLOCK, 16], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < size, other=-float("inf")).to(tl.float32)
        counts = (value >= low) & (value < high)
        weight = tl.exp(value * inverse - top) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
        weight = tl.where(counts, weight, 0.0)
        place = _key(value) if KEYS else value
        sums += tl.where(place[:, None] >= thresholds[None, :], weight[:, None], 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _gather(row, scratch, size, low, high, capacity, BLOCK: tl.constexpr):
    """Copy the elements in [low, high) to `scratch`, as far as they fit -> how many there are."""
    count = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
        chosen = (at < size) & (value >= low) & (value < high)
        place = count + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(scratch + place, value, mask=chosen & (place < capacity))
        count += tl.sum(chosen.to(tl.int32), axis=0)
    return count


@triton.jit
def _least_kept(
    row, scratch, size, capacity, low, high, inverse, top, limit, BY_MASS: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr
):  # fmt: skip
    """The largest value such that the elements not below it (and not below `low`) number `limit`, or weigh that share of all of them.

    `low` and `high` are the least and the largest element that count.
    """
    steps = tl.arange(0, 16)
    infinity = float("inf")
    thresholds = low + (high - low) * (steps.to(tl.float32) / 16)
    sums = _weights_from(row, size, thresholds, low, infinity, inverse, top, BY_MASS, False, NARROW)
    goal = limit
    if BY_MASS:
        goal = limit * tl.max(sums, axis=0)
    found = tl.max(tl.where(sums >= goal, steps, 0), axis=0)
    bottom = tl.max(tl.where(steps == found, thresholds, -infinity), axis=0)
    ceiling = tl.min(tl.where(steps == found + 1, thresholds, infinity), axis=0)
    above = tl.sum(tl.where(steps == found + 1, sums, 0.0), axis=0)
    count = _gather(row, scratch, size, bottom, ceiling, capacity, BLOCK)
    tl.debug_barrier()
    fits = count <= capacity
    prefix = _key(bottom)
    width = _key(tl.minimum(ceiling, high)) - prefix
    for step in range(8):
        shift = 28 - 4 * step
        if (width >> shift) > 0 or step == 7:
            keys = prefix + (steps.to(tl.int64) << shift)
            if fits:
                sums = _weights_from(scratch, count, keys, bottom, ceiling, inverse, top, BY_MASS, True, NARROW)
            else:
                sums = _weights_from(row, size, keys, bottom, ceiling, inverse, top, BY_MASS, True, NARROW)
            found = tl.max(tl.where((sums > 0) & (sums + above >= goal), steps, 0), axis=0)
            prefix += found.to(tl.int64) << shift
    return tl.minimum(_value(prefix), high)


@triton.jit
def _mass(row, size, top, inverse, least, BLOCK: tl.constexpr):
    """Sum of the weights of the elements not below `least`."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
        total += tl.where(value >= least, tl.exp(value * inverse - top), 0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize_on_alignment=["uniforms", "temperatures", "top_ks", "top_ps", "min_ps"])  # columns of one upload
def _sample(
    logits, uniforms, temperatures, top_ks, top_ps, min_ps, scratch, out, stride, size, capacity,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    row = logits + line * stride
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    worst = tl.full([BLOCK], float("inf"), tl.float32)
    where = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=-float("inf")).to(tl.float32)
        where = tl.where(value > best, at, where)
        best = tl.maximum(best, value)
        worst = tl.where(value > -float("inf"), tl.minimum(worst, value), worst)
    high = tl.max(best, axis=0)
    chosen = tl.min(tl.where(best == high, where, 2147483647), axis=0)
    temperature = tl.load(temperatures + line)
    if temperature > 0:
        inverse = 1.0 / temperature
        top = high * inverse
        least = tl.min(worst, axis=0)
        if TOP_K:
            top_k = tl.load(top_ks + line)
            if (top_k > 0) & (top_k < size):
                k = top_k.to(tl.float32)
                least = _least_kept(row, scratch + line * capacity, size, capacity, least, high, inverse, top, k, False, BLOCK, NARROW)
        if TOP_P:
            top_p = tl.load(top_ps + line)
            if top_p < 1:
                least = _least_kept(row, scratch + line * capacity, size, capacity, least, high, inverse, top, top_p, True, BLOCK, NARROW)
        if MIN_P:
            floor = tl.load(min_ps + line)
            if floor > 0:
                least = tl.maximum(least, high + tl.log(floor) * temperature)
        least = tl.minimum(least, high)
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
        kept = (at < size) & (value >= least) & (value > -float("inf"))
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
        block = min(4096, max(16, next_power_of_2(size)))
        capacity = min(_SCRATCH, size)
        limited = top_k is not None or top_p is not None
        scratch = torch.empty((rows, capacity), dtype=torch.float32, device=logits.device) if limited else out
        _sample[(rows,)](
            logits, uniforms, temperature, top_k, top_p, min_p, scratch, out, logits.stride(0), size, capacity,
            TOP_K=top_k is not None, TOP_P=top_p is not None, MIN_P=min_p is not None, BLOCK=block, NARROW=min(512, block), num_warps=8,
        )  # fmt: skip
    return out
