"""The operations so that each row's result depends on that row alone, to the last bit, whatever else is in the step. On a GPU, by Triton.

Norms, the activation, rotation and sampling work by row anyway; here each is one compiled kernel, whatever the number of rows. Matrix
products (`triton_kernels/invariant_linear.py`) and attention (`triton_kernels/invariant_attention.py`) never split a sum by the shape of a
batch, and nothing is left to the vendor's library. Checks of shapes are in `api.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gantline_kernels import cuda_backend, triton_backend
from gantline_kernels.invariance import Products, take_likeliest
from gantline_kernels.shared_prefix import SharedPrefixes
from gantline_kernels.triton_kernels import elementwise, rope
from gantline_kernels.triton_kernels.awq import awq_dequantize
from gantline_kernels.triton_kernels.early import NOT_EARLY
from gantline_kernels.triton_kernels.invariant_attention import PIECE, invariant_attention
from gantline_kernels.triton_kernels.invariant_linear import Tile, tiles_of
from gantline_kernels.triton_kernels.invariant_linear import invariant_awq_linear as awq_linear
from gantline_kernels.triton_kernels.invariant_linear import invariant_linear as linear
from gantline_kernels.triton_kernels.logprobs import logsumexp
from gantline_kernels.triton_kernels.masking import mask_tokens
from gantline_kernels.triton_kernels.sampling import argmax

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

_MOST_TRIED_OUTPUTS = 384
"""Three of the widest tiles: which output a program computes does not matter to the row."""
_BLOCK_SIZE = 64


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return elementwise.rms_norm(x, weight, eps, early=NOT_EARLY)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return elementwise.add_rms_norm(x, residual, weight, eps, early=NOT_EARLY)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return silu_and_mul(linear(x, weight, bias, None))


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return elementwise.silu_and_mul(x, early=NOT_EARLY)


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
    return rope.rope_and_cache_write(
        q, k, v, cos_sin, positions, key_cache, value_cache, slots, q_norm_weight, k_norm_weight, eps, early=NOT_EARLY
    )


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
    """What sequences share is read again for each."""
    out = q.new_empty(q.shape)
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    invariant_attention(
        q, key_cache, value_cache, block_tables, query_starts, context_lens, out,
        scale, num_decodes, max_context_len, sliding_window, logit_softcap,
    )  # fmt: skip
    return out


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """Always with all limits: which of them the other rows need must not decide on the compiled kernel."""
    no_limit = torch.zeros_like(temperature)
    limits = (no_limit.int() if top_k is None else top_k, no_limit + 1 if top_p is None else top_p, no_limit if min_p is None else min_p)
    run = cuda_backend.sample if logits.is_cuda and not torch.version.hip else triton_backend.sample
    return run(logits, uniforms, temperature, *limits)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = logsumexp(logits)
    top, ids = take_likeliest(logits, count, argmax)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
    return chosen - total, ids, top - total.unsqueeze(-1)


def find_variance(products: Products) -> str:
    """Try whether a tile's size or a row's place in it decides on results on this device, for products with the model's matrices and for
    attention; says where it does, or nothing. What is compiled for it is what the model will run."""
    generator = torch.Generator(products.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=products.device).to(products.dtype)

    for inputs, outputs in products.matrices:
        if _product_varies(inputs, min(outputs, _MOST_TRIED_OUTPUTS), products, random):
            return f"the product with a matrix of {inputs} inputs and {outputs} outputs"
    return "attention" if _attention_varies(products, random) else ""


def _product_varies(inputs: int, outputs: int, products: Products, random: Callable[..., torch.Tensor]) -> bool:
    weight, group = random(outputs, inputs), products.awq_group_size
    runs: list[tuple[tuple[Tile, ...], Callable[[torch.Tensor, Tile], torch.Tensor]]] = [
        (tiles_of(products.dtype), lambda x, tile: linear(x, weight, None, None, tile=tile))
    ]
    if group is not None and inputs % group == 0 and outputs % 8 == 0:
        sizes = ((n, outputs // 8) for n in (inputs, inputs // group))
        qweight, qzeros = (torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device=weight.device) for size in sizes)
        scales = random(inputs // group, outputs)
        runs.append((tiles_of(products.dtype, awq=True), lambda x, tile: awq_linear(x, qweight, qzeros, scales, group, None, tile=tile)))
    row = random(1, inputs)
    for tiles, run in runs:
        alone = run(row, tiles[0])
        for tile in tiles:
            x = random(tile.rows + 3, inputs)
            places = [0, 1, tile.rows // 2 + 1, tile.rows - 1, tile.rows + 1]
            x[places] = row
            if not torch.equal(run(x, tile)[places], alone.expand(len(places), -1)):
                return True
    return False


def _attention_varies(products: Products, random: Callable[..., torch.Tensor]) -> bool:
    """A context of two pieces: its last queries all at once, then cut where no tile ends, then each by itself."""
    count, length = 70, PIECE + 150
    blocks = -(-length // _BLOCK_SIZE)
    q = random(count, products.heads, products.head_dim)
    keys, values = (random(blocks, products.kv_heads, _BLOCK_SIZE, products.head_dim) for _ in range(2))

    def whole(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    def attend(first: int, last: int, *, decodes: int = 0) -> torch.Tensor:
        context = length - count + last
        table = torch.arange(blocks, dtype=torch.int32, device=q.device).unsqueeze(0)
        arguments = (q[first:last].contiguous(), keys, values, table, whole(0, last - first), whole(context), products.head_dim**-0.5)
        return paged_attention(*arguments, last - first, context, decodes, 0, 0.0, None)

    together = attend(0, count)
    if not torch.equal(together, torch.cat([attend(0, 37), attend(37, count)])):
        return True
    return any(not torch.equal(together[i : i + 1], attend(i, i + 1, decodes=1)) for i in (0, 1, 36, count - 1))
