"""The operations of `api.py` in float32, as plainly as they can be written: what every kernel is compared with.

Same names and arguments, without `backend`. Loops over sequences and heads; reads lengths on the host. Inputs of any floating type are
taken up to float32 first; results are float32, but for the caches, which keep their type.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from gantline_kernels.shared_prefix import SharedPrefixes

__all__ = [
    "add_rms_norm",
    "argmax",
    "awq_dequantize",
    "awq_linear",
    "gated_linear",
    "kept_probabilities",
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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps), total.float()


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return silu_and_mul(linear(x, weight, bias))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def rope_and_cache_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    block_size = key_cache.shape[2]
    q = _rotate(q.float() if q_norm_weight is None else rms_norm(q, q_norm_weight, eps), cos_sin[positions.long()])
    k = _rotate(k.float() if k_norm_weight is None else rms_norm(k, k_norm_weight, eps), cos_sin[positions.long()])
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            key_cache[slot // block_size, :, slot % block_size] = k[token].to(key_cache.dtype)
            value_cache[slot // block_size, :, slot % block_size] = v[token].to(value_cache.dtype)
    return q


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], cos_sin [T, D]: dimension i turns with i + D/2."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def paged_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
    max_query_len: int,
    max_context_len: int,
    num_decodes: int = 0,
    sliding_window: int = 0,
    logit_softcap: float = 0.0,
    shared: SharedPrefixes | None = None,
) -> torch.Tensor:
    """`shared` changes nothing; that it is true of the block tables is checked. Raises ValueError if not."""
    if shared is not None:
        _check_shared(shared, block_tables, context_lens, key_cache.shape[2])
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    starts = query_starts.tolist()
    for i, context in enumerate(context_lens.tolist()):
        queries = q[starts[i] : starts[i + 1]].float()
        keys, values = (_gather(cache, block_tables[i], context) for cache in (key_cache, value_cache))
        out[starts[i] : starts[i + 1]] = _attend(queries, keys, values, scale, sliding_window, logit_softcap)
    return out


def _check_shared(shared: SharedPrefixes, block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int) -> None:
    lens, members, starts = shared.lens.tolist(), shared.members.tolist(), shared.starts.tolist()
    grouped = members[: starts[-1]]
    if sorted(grouped) != [i for i, length in enumerate(lens) if length]:
        raise ValueError(f"the groups have the members {grouped}, the lengths are {lens}")
    for start, end in pairwise(starts):
        group = members[start:end]
        length = lens[group[0]] if group else 0
        tables = block_tables[group, : length // block_size]
        if length % block_size or any(lens[i] != length or context_lens[i] <= length for i in group) or bool((tables != tables[:1]).any()):
            raise ValueError(f"the sequences {group} do not share {length} tokens: {tables.tolist()}")
    if max(context - length for context, length in zip(context_lens.tolist(), lens, strict=False)) > shared.max_own_len:
        raise ValueError(f"a sequence has more than {shared.max_own_len} tokens of its own")


def _gather(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` entries of a sequence: [Hkv, length, D]."""
    blocks = cache[table[: -(-length // cache.shape[2])].long()].float()
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def _attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int, softcap: float) -> torch.Tensor:
    """q [n, Hq, D], keys and values [Hkv, length, D]: the queries are the last n of the context. Head by head, to bound memory."""
    queries, length, group = len(q), keys.shape[1], q.shape[1] // len(keys)
    at = torch.arange(length - queries, length, device=q.device).unsqueeze(1)
    other = torch.arange(length, device=q.device).unsqueeze(0)
    seen = other <= at
    if window:
        seen &= other > at - window
    results = []
    for head, (head_keys, head_values) in enumerate(zip(keys, values, strict=True)):
        scores = torch.matmul(q[:, head * group : (head + 1) * group].transpose(0, 1), head_keys.t()) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        results.append(torch.matmul(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), head_values).transpose(0, 1))
    return torch.cat(results, dim=1)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = x.float() @ weight.float().t()
    return out if bias is None else out + bias.float()


def awq_dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    weights, zeros = _unpack(qweight), _unpack(qzeros)
    zeros, factors = (x.repeat_interleave(group_size, dim=0) for x in (zeros, scales.float()))
    return (weights - zeros) * factors


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] -> [R, 8 C] of 0 to 15."""
    shifts = torch.tensor(_AWQ_BITS_OF_COLUMN, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)


def awq_linear(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    out = x.float() @ awq_dequantize(qweight, qzeros, scales, group_size)
    return out if bias is None else out + bias.float()


def argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().argmax(dim=-1)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    for row, words in zip(rows.tolist(), allowed.tolist(), strict=True):
        for token in range(logits.shape[1]):
            if not words[token // 32] >> token % 32 & 1:
                logits[row, token] = -torch.inf


def kept_probabilities(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """One row [V]: probabilities, not normalised, of the tokens that the limits keep, 0 for others."""
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    if 0 < top_k < len(probabilities):
        kth = probabilities.topk(top_k).values[-1]
        probabilities = torch.where(probabilities >= kth, probabilities, 0.0)
        probabilities = probabilities / probabilities.sum()
    if top_p < 1.0:
        ordered = probabilities.sort(descending=True).values
        before = ordered.cumsum(dim=0) - ordered
        last = ordered[before < top_p][-1] if top_p > 0 else ordered[0]
        probabilities = torch.where(probabilities >= last, probabilities, 0.0)
    return torch.where(probabilities >= min_p * probabilities.max(), probabilities, 0.0)


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens = argmax(logits)
    for i, degree in enumerate(temperature.tolist()):
        if degree > 0:
            k = 0 if top_k is None else int(top_k[i])
            p = 1.0 if top_p is None else float(top_p[i])
            least = 0.0 if min_p is None else float(min_p[i])
            cumulative = kept_probabilities(logits[i], degree, k, p, least).cumsum(dim=0)
            tokens[i] = int((cumulative <= uniforms[i].double() * cumulative[-1]).sum())
    return tokens


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of equally likely tokens the first comes first."""
    logprobs = logits.float().log_softmax(dim=-1)
    ordered, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return logprobs.gather(1, tokens.unsqueeze(1))[:, 0], ids[:, :count], ordered[:, :count]
