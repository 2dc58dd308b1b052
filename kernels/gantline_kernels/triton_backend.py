"""The operations by Triton's kernels; matrix products of several rows by the vendor's library, through torch. Checks are in `api.py`."""

from __future__ import annotations

import torch

from gantline_kernels import torch_backend
from gantline_kernels.shared_prefix import SharedPrefixes
from gantline_kernels.torch_backend import token_logprobs
from gantline_kernels.triton_kernels.awq import awq_dequantize, awq_linear
from gantline_kernels.triton_kernels.decode import decode_attention
from gantline_kernels.triton_kernels.elementwise import add_rms_norm, rms_norm, silu_and_mul
from gantline_kernels.triton_kernels.linear import has_one_row_linear, one_row_linear
from gantline_kernels.triton_kernels.masking import mask_tokens
from gantline_kernels.triton_kernels.prefill import prefill_attention
from gantline_kernels.triton_kernels.rope import rope_and_cache_write
from gantline_kernels.triton_kernels.sampling import argmax, sample

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
    out = q.new_empty(q.shape)
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    if num_decodes:
        decode_attention(
            q[:num_decodes], key_cache, value_cache, block_tables, context_lens, out[:num_decodes],
            scale, max_context_len, sliding_window, logit_softcap, shared,
        )  # fmt: skip
    if num_decodes < len(context_lens):
        prefill_attention(
            q, key_cache, value_cache, block_tables, query_starts, context_lens, out,
            scale, max_context_len, num_decodes, sliding_window, logit_softcap,
        )  # fmt: skip
    return out


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return silu_and_mul(linear(x, weight, bias, None))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.Tensor:
    if has_one_row_linear(x, weight):
        return one_row_linear(x, weight, bias, out_dtype)
    return torch_backend.linear(x, weight, bias, out_dtype)
