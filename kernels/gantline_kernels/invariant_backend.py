"""The operations so that each row's result depends on that row alone, to the last bit, whatever else is in the step. On a CPU.

Floating-point sums depend on their order, and libraries choose orders by the shape of the whole input: a request's logits differ a little
with the requests beside it, with the chunks that its prompt was cut into, with what the cache had. Here every matrix product has one
fixed shape: `ROWS` rows at a time, the last ones padded, and `KEYS` keys at a time, from the context's beginning on. What is left to the
library is that a row's place among the `ROWS` does not matter, which `find_variance` tries on the machine at hand. Functions that are not
exactly rounded (exp, tanh) come in a vectorized form and another for what is left over, so they run over pieces that are never split.

Prompts and decoding take the same way, so computing a sequence again after preemption gives the same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from gantline_kernels import torch_backend
from gantline_kernels.invariance import Products, take_likeliest
from gantline_kernels.shared_prefix import SharedPrefixes
from gantline_kernels.torch_backend import add_rms_norm, argmax, awq_dequantize, mask_tokens, rms_norm, rope_and_cache_write, sample

__all__ = [
    "add_rms_norm",
    "argmax",
    "awq_dequantize",
    "awq_linear",
    "find_variance",
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

ROWS = 16
KEYS = 256
_MOST_TRIED_OUTPUTS = 1 << 15
_UNSPLIT = 1 << 15
"""Elements that torch gives to one thread at least (at::internal::GRAIN_SIZE): so many are never divided in mid-row."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.Tensor:
    out = torch.empty(len(x), len(weight), dtype=out_dtype or x.dtype, device=x.device)
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        out[start : start + ROWS] = F.linear(_padded(rows), weight, bias)[: len(rows)]
    return out


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Exactly `ROWS` rows in memory of their own: where a matrix begins may decide on a library's path."""
    tile = rows.new_zeros(ROWS, rows.shape[1])
    tile[: len(rows)] = rows
    return tile


def awq_linear(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return linear(x, awq_dequantize(qweight, qzeros, scales, group_size).to(x.dtype).t().contiguous(), bias, None)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return silu_and_mul(linear(x, weight, bias, None))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(len(x), x.shape[1] // 2)
    step = max(1, _UNSPLIT // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        out[start : start + step] = torch_backend.silu_and_mul(x[start : start + step])
    return out


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
    """Sequence by sequence; what they share is read again for each."""
    out = torch.empty_like(q)
    lengths, starts = context_lens.tolist(), query_starts.tolist()
    for i, length in enumerate(lengths):
        first, count = starts[i], starts[i + 1] - starts[i]
        if count:
            keys, values = (_chunks(cache, block_tables[i : i + 1], length) for cache in (key_cache, value_cache))
            out[first : first + count] = _attend(q[first : first + count], keys, values, length, scale, sliding_window, logit_softcap)
    return out


def _chunks(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """A sequence's keys or values as float32 [chunks, Hkv, KEYS, D], zero past its end (what was never written may be no number)."""
    gathered = torch_backend._gather(cache, table, length)[0].float()
    heads, _, dim = gathered.shape
    count = -(-length // KEYS)
    chunks = gathered.new_zeros(heads, count * KEYS, dim)
    chunks[:, :length] = gathered
    return chunks.view(heads, count, KEYS, dim).transpose(0, 1).contiguous()


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: int, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """q [n, Hq, D], the last n of `length` tokens -> [n, Hq, D]. Rows of a key head are (query, head of its group)."""
    count, heads, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    rows = q.float().view(count, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, count * group, dim)
    places = torch.arange(length - count, length, device=q.device).repeat_interleave(group)
    out = torch.empty_like(rows)
    for start in range(0, count * group, ROWS):
        part, at = rows[:, start : start + ROWS], places[start : start + ROWS]
        tile = part.new_zeros(kv_heads, ROWS, dim)
        tile[:, : part.shape[1]] = part
        padded_at = at.new_full((ROWS,), int(at[-1]))
        padded_at[: len(at)] = at
        out[:, start : start + ROWS] = _attend_tile(tile, padded_at, keys, values, scale, window, softcap)[:, : part.shape[1]]
    return out.view(kv_heads, count, group, dim).transpose(0, 1).reshape(count, heads, dim).to(q.dtype)


def _attend_tile(
    q: torch.Tensor, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """q [Hkv, ROWS, D], row r at place `at[r]`, over chunks of keys and values, with a running maximum and sum (as in flash attention). A
    chunk of which a row sees nothing leaves that row as it is, bit for bit."""
    first = max(0, int(at.min()) - window + 1) // KEYS if window else 0
    best = q.new_full((len(q), ROWS, 1), -torch.inf)
    total, out = torch.zeros_like(best), torch.zeros_like(q)
    for chunk in range(first, int(at.max()) // KEYS + 1):
        scores = torch.bmm(q, keys[chunk].transpose(1, 2).contiguous()) * scale
        if softcap:
            scores = _unsplit(torch.tanh, scores / softcap) * softcap
        key_at = torch.arange(chunk * KEYS, (chunk + 1) * KEYS, device=q.device)
        hidden = key_at > at.unsqueeze(1)
        if window:
            hidden |= key_at <= at.unsqueeze(1) - window
        scores = scores.masked_fill(hidden, -torch.inf)
        higher = torch.maximum(best, scores.amax(-1, keepdim=True))
        reference = torch.where(higher == -torch.inf, 0.0, higher)
        weights, kept = _unsplit(torch.exp, scores - reference), _unsplit(torch.exp, (best - reference).expand(-1, -1, KEYS))[..., :1]
        total = total * kept + weights.sum(-1, keepdim=True)
        out = out * kept + torch.bmm(weights, values[chunk])
        best = higher
    return out / total


def _unsplit(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of x [Hkv, ROWS, KEYS], in pieces that one thread does, without a remainder that would go another way."""
    step = max(1, _UNSPLIT // (ROWS * KEYS))
    return torch.cat([function(x[start : start + step].contiguous()) for start in range(0, len(x), step)])


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = logits.float().log_softmax(dim=-1)
    top, ids = take_likeliest(logprobs, count, argmax)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), ids, top


def find_variance(products: Products) -> str:
    """Try whether a row's place among `ROWS` decides on its result here, for products with the model's matrices and for attention; says
    where it does, or nothing."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dtype, kv_heads = products.dtype, products.kv_heads
    for inputs, outputs in products.matrices:
        outputs = min(outputs, _MOST_TRIED_OUTPUTS)
        weight, row = random(outputs, inputs).to(dtype), random(inputs).to(dtype)
        if _varies(lambda x, weight=weight: F.linear(x, weight), random(ROWS, inputs).to(dtype), row):  # type: ignore[misc]
            return f"the product with a matrix of {inputs} inputs and {outputs} outputs"
    for inner, outer in ((products.head_dim, KEYS), (KEYS, products.head_dim)):
        other = random(kv_heads, inner, outer)
        if _varies(lambda x, other=other: torch.bmm(x, other), random(kv_heads, ROWS, inner), random(kv_heads, inner)):  # type: ignore[misc]
            return "attention's product"
    return ""


def _varies(product: Callable[[torch.Tensor], torch.Tensor], others: torch.Tensor, row: torch.Tensor) -> bool:
    results = []
    for place in range(ROWS):
        x = others.clone()
        x[..., place, :] = row
        results.append(product(x)[..., place, :])
    return not all(torch.equal(results[0], result) for result in results)
