"""The operations in plain torch: any device, the input's type, fast enough to serve small models on a CPU.

Decoding sequences are attended in groups of similar length, padded to the longest, a shared prefix once for each such group; prompts one
by one. Checks are in `api.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F

from gantline_kernels.shared_prefix import SharedPrefixes

__all__ = [
    "add_rms_norm",
    "argmax",
    "awq_dequantize",
    "awq_linear",
    "gated_linear",
    "linear",
    "mask_tokens",
    "paged_attention",
    "rms_norm",
    "rope_and_cache_write",
    "sample",
    "silu_and_mul",
    "token_logprobs",
]

_AWQ_BITS_OF_COLUMN = (0, 16, 4, 20, 8, 24, 12, 28)
_MAX_PADDING = 1.5
"""A group of decodes is closed when padding would make it this much larger than it is."""
_MAX_GROUP_TOKENS = 1 << 17
"""Keys gathered at once, which bounds the copy that gathering makes."""
_MASK_ROWS = 512
"""Queries attended at once where a mask is needed, which bounds the mask."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return silu_and_mul(linear(x, weight, bias, None))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


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
    q = q if q_norm_weight is None else rms_norm(q, q_norm_weight, eps)
    k = k if k_norm_weight is None else rms_norm(k, k_norm_weight, eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    written = slots >= 0
    if not slots.is_cuda and not bool(written.all()):
        _write(_rotate(k, cos, sin)[written], v[written], key_cache, value_cache, slots[written])
    elif slots.is_cuda:  # without waiting: padding rewrites what the cache holds
        _write_masked(_rotate(k, cos, sin), v, key_cache, value_cache, slots, written)
    else:
        _write(_rotate(k, cos, sin), v, key_cache, value_cache, slots)
    return _rotate(q, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _write(k: torch.Tensor, v: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor) -> None:
    block_size = key_cache.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    key_cache[blocks, :, offsets] = k.to(key_cache.dtype)
    value_cache[blocks, :, offsets] = v.to(value_cache.dtype)


def _write_masked(
    k: torch.Tensor, v: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor, written: torch.Tensor
) -> None:
    """Rows that are not written repeat the write of the first row that is, so that no two writes of one place differ."""
    stand_in = written.int().argmax().view(1)
    source = torch.where(written, torch.arange(len(slots), device=slots.device), stand_in)
    slots = slots[source].clamp(min=0)
    block_size = key_cache.shape[2]
    any_written = written.any()
    for new, cache in ((k[source].to(key_cache.dtype), key_cache), (v[source].to(value_cache.dtype), value_cache)):
        at = (slots // block_size, slice(None), slots % block_size)
        cache[at] = torch.where(any_written, new, cache[at])


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    max_query_len: int,
    max_context_len: int,
    num_decodes: int,
    sliding_window: int,
    logit_softcap: float,
    shared: SharedPrefixes | None,
) -> torch.Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lengths, starts = context_lens.tolist(), query_starts.tolist()
    for prefix, own in _by_prefix(num_decodes, shared):
        for group in _groups({i: lengths[i] - prefix for i in own if lengths[i]}):
            members = torch.tensor(group, device=q.device)
            tables, longest = block_tables[members], max(lengths[i] for i in group) - prefix
            tables, first = tables[:, prefix // key_cache.shape[2] :], tables[:1]
            common = [_gather(cache, first, prefix) for cache in (key_cache, value_cache)] if prefix else None
            keys, values = (_gather(cache, tables, longest) for cache in (key_cache, value_cache))
            ends = context_lens[members] - prefix
            out[members] = _attend_decodes(q[members], keys, values, ends, scale, sliding_window, logit_softcap, common)
    for i in range(num_decodes, len(lengths)):
        if starts[i + 1] > starts[i]:
            keys, values = (_gather(cache, block_tables[i : i + 1], lengths[i])[0] for cache in (key_cache, value_cache))
            rows_of = slice(starts[i], starts[i + 1])
            out[rows_of] = _attend_prompt(q[rows_of], keys, values, scale, sliding_window, logit_softcap)
    return out


def _by_prefix(num_decodes: int, shared: SharedPrefixes | None) -> Iterator[tuple[int, Iterable[int]]]:
    """(tokens that they share, sequence numbers) of each group, and of those in none."""
    if shared is None:
        yield 0, range(num_decodes)
        return
    lens, members, starts = shared.lens.tolist(), shared.members.tolist(), shared.starts.tolist()
    yield 0, [i for i in range(num_decodes) if not lens[i]]
    for start, end in pairwise(starts):
        if start < end:
            yield lens[members[start]], members[start:end]


def _groups(lengths: dict[int, int]) -> Iterator[list[int]]:
    """Sequence numbers (of numbers and lengths) in groups of similar length, longest first, so that padding costs little."""
    group: list[int] = []
    total = 0
    for i in sorted(lengths, key=lambda i: -lengths[i]):
        padded = (len(group) + 1) * lengths[group[0]] if group else 0
        if group and (padded > _MAX_PADDING * (total + lengths[i]) or padded > _MAX_GROUP_TOKENS):
            yield group
            group, total = [], 0
        group.append(i)
        total += lengths[i]
    if group:
        yield group


def _gather(cache: torch.Tensor, tables: torch.Tensor, length: int) -> torch.Tensor:
    """[n, Hkv, length, D] of n sequences; what lies past a sequence's own length is anything (a table's unused entries may be too)."""
    _, heads, block_size, dim = cache.shape
    used = tables[:, : -(-length // block_size)].long().clamp(0, cache.shape[0] - 1)
    blocks = cache.index_select(0, used.reshape(-1)).view(*used.shape, heads, block_size, dim)
    return blocks.transpose(1, 2).reshape(len(tables), heads, -1, dim)[:, :, :length]


def _attend_decodes(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    common: list[torch.Tensor] | None,
) -> torch.Tensor:
    """q [n, Hq, D], keys and values [n, Hkv, longest, D], after `common` keys and values [1, Hkv, prefix, D] of all -> [n, Hq, D]."""
    n, heads, dim = q.shape
    kv_heads, longest = keys.shape[1], keys.shape[2]
    grouped = q.view(n, kv_heads, heads // kv_heads, dim)
    scores = torch.matmul(grouped, keys.transpose(-1, -2)).float() * scale
    at = torch.arange(longest, device=q.device)
    ends = lengths.unsqueeze(1)
    hidden = at >= ends
    if window:
        hidden |= at < ends - window
    if common is not None:
        scores = torch.cat([_with_common(grouped, common[0].transpose(-1, -2)).float() * scale, scores], dim=-1)
        hidden = F.pad(hidden, (scores.shape[-1] - longest, 0), value=False)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1).to(q.dtype)
    values = values.masked_fill((at >= ends)[:, None, :, None], 0.0)  # what was never written may be no number
    out = torch.matmul(weights[..., -longest:], values)
    if common is not None:
        out += _with_common(weights[..., :-longest], common[1])
    return out.view(n, heads, dim)


def _with_common(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x [n, Hkv, G, K] @ y [1, Hkv, K, N] -> [n, Hkv, G, N], reading y once."""
    n, kv_heads, group, _ = x.shape
    rows = x.transpose(0, 1).reshape(kv_heads, n * group, -1)
    return torch.matmul(rows, y[0]).view(kv_heads, n, group, -1).transpose(0, 1)


def _attend_prompt(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
    """q [n, Hq, D], the last n of the context of keys and values [Hkv, length, D] -> [n, Hq, D]."""
    queries, length = len(q), keys.shape[1]
    wide_q, wide_k, wide_v = q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0)
    if queries == length and not window and not softcap:
        out = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    parts = []
    for start in range(0, queries, _MASK_ROWS):
        rows = slice(start, min(start + _MASK_ROWS, queries))
        end = length - queries + rows.stop  # what the last of these queries sees
        begin = max(0, length - queries + start - window + 1) if window else 0
        seen = _seen(length - queries + start, end, begin, window, q.device)
        part_q, part_k, part_v = wide_q[:, :, rows], wide_k[:, :, begin:end], wide_v[:, :, begin:end]
        parts.append(_attend_masked(part_q, part_k, part_v, seen, scale, softcap))
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _seen(first: int, end: int, begin: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [end - first, end - begin]: whether the query at each place first.. sees the key at each place begin.."""
    at = torch.arange(first, end, device=device).unsqueeze(1)
    other = torch.arange(begin, end, device=device).unsqueeze(0)
    seen = other <= at
    return seen & (other > at - window) if window else seen


def _attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = softcap * torch.tanh(torch.matmul(q, k.transpose(-1, -2)).float() * scale / softcap)
    return torch.matmul(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(q.dtype), v)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.Tensor:
    if out_dtype is None or out_dtype == x.dtype:
        return F.linear(x, weight, bias)
    if x.is_cuda:
        out = torch.mm(x, weight.t(), out_dtype=out_dtype)
        return out if bias is None else out.add_(bias)
    return F.linear(x, weight, bias).to(out_dtype)


def awq_dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    inputs, outputs = qweight.shape[0], scales.shape[1]
    weights = _unpack(qweight).view(-1, group_size, outputs)
    zeros = _unpack(qzeros).unsqueeze(1)
    return ((weights - zeros) * scales.float().unsqueeze(1)).view(inputs, outputs).to(scales.dtype)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] -> float32 [R, 8 C] of 0 to 15."""
    shifts = torch.tensor(_AWQ_BITS_OF_COLUMN, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1).float()


def awq_linear(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    out = torch.matmul(x, awq_dequantize(qweight, qzeros, scales, group_size).to(x.dtype))
    return out if bias is None else out + bias


def argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    bits = (allowed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=allowed.device)) & 1
    logits[rows] = logits[rows].masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    random = temperature > 0
    scaled = logits.float() / torch.where(random, temperature, 1.0).unsqueeze(-1)
    probabilities = scaled.softmax(dim=-1)
    if top_k is not None or top_p is not None or min_p is not None:
        probabilities = _limit(probabilities, top_k, top_p, min_p)
    cumulative = probabilities.double().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniforms.double().unsqueeze(-1) * cumulative[:, -1:], right=True).squeeze(-1)
    return torch.where(random, drawn.clamp(max=logits.shape[1] - 1), logits.argmax(dim=-1))


def _limit(probabilities: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None) -> torch.Tensor:
    """Zero what the limits drop: each limit becomes a least probability that a token must have."""
    ordered = probabilities.sort(dim=-1, descending=True).values
    if top_k is not None:
        size = ordered.shape[1]
        last = torch.where(top_k > 0, top_k, size).clamp(max=size).long().unsqueeze(-1) - 1
        least = ordered.gather(-1, last)
        ordered = torch.where(ordered >= least, ordered, 0.0)
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    if top_p is not None:
        total = ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered
        count = (before < top_p.unsqueeze(-1) * total).sum(dim=-1, keepdim=True)
        least = ordered.gather(-1, (count - 1).clamp(min=0))
        probabilities = torch.where(probabilities >= least, probabilities, 0.0)
    if min_p is not None:
        probabilities = torch.where(probabilities >= min_p.unsqueeze(-1) * ordered[:, :1], probabilities, 0.0)
    return probabilities


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = logits.float().log_softmax(dim=-1)
    top, ids = logprobs.topk(count, dim=-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), ids, top
