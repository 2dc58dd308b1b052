"""The operations on NVIDIA GPUs: CUDA C++ where it wins and is built, Triton's kernels elsewhere. Checks are in `api.py`."""

from __future__ import annotations

from functools import cache

import torch

from gantline_kernels import devices, library, prefill_split, triton_backend
from gantline_kernels.few_rows_linear import few_rows_gated_linear, few_rows_linear, has_few_rows_linear
from gantline_kernels.hopper_batch_linear import batch_linear, has_batch_linear
from gantline_kernels.hopper_decode import AFTER_WAIT, fits_hopper_decode, hopper_decode
from gantline_kernels.hopper_gated_linear import gated_linear as hopper_gated_linear
from gantline_kernels.hopper_gated_linear import has_gated_linear
from gantline_kernels.hopper_sampling import fits_hopper_sample, hopper_sample
from gantline_kernels.hopper_split_linear import has_split_linear, split_linear
from gantline_kernels.scratch import kept
from gantline_kernels.shared_prefix import SharedPrefixes
from gantline_kernels.triton_backend import (
    add_rms_norm,
    argmax,
    awq_dequantize,
    awq_linear,
    mask_tokens,
    rms_norm,
    rope_and_cache_write,
    silu_and_mul,
    token_logprobs,
)
from gantline_kernels.triton_kernels.decode import decode_attention
from gantline_kernels.triton_kernels.prefill import prefill_attention

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

_HOPPER = (9, 0)
_ROWS = 128
_TYPES = {torch.bfloat16: 0, torch.float16: 1}


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
    has_prompts = num_decodes < len(context_lens)
    inputs = (q, key_cache, value_cache, block_tables, query_starts, context_lens, out)
    prompts = None
    if has_prompts and _has_hopper_prefill(q, key_cache.shape[2], logit_softcap):
        # Made first: its memory must not be what the decodes leave, beside which it may run.
        prompts = _HopperPrefill(*inputs, scale, max_context_len, num_decodes, sliding_window)
    beside = False
    if num_decodes:
        decodes = (q[:num_decodes], key_cache, value_cache, block_tables, context_lens, out[:num_decodes])
        limits = (scale, max_context_len, sliding_window, logit_softcap)
        if shared is None and fits_hopper_decode(decodes[0], key_cache) and _has_hopper_kernels(q.device):
            beside = prompts is not None
            hopper_decode(*decodes, *limits, early=AFTER_WAIT if beside else None)
        else:
            decode_attention(*decodes, *limits, shared)
    if prompts is not None:
        prompts.launch(beside=beside)
    elif has_prompts:
        prefill_attention(*inputs, scale, max_context_len, num_decodes, sliding_window, logit_softcap)
    return out


def _has_hopper_prefill(q: torch.Tensor, block_size: int, logit_softcap: float) -> bool:
    fits = q.shape[2] in (64, 128) and q.dtype in _TYPES and block_size & (block_size - 1) == 0 and 16 <= block_size <= 1024
    aligned = q.stride(0) % 8 == 0 and q.data_ptr() % 16 == 0
    return fits and aligned and not logit_softcap and _has_hopper_kernels(q.device)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _new_counters(index: int) -> torch.Tensor:
    """The prefill kernel's two numbers, zero between launches."""
    return torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")


class _HopperPrefill:
    """A launch of `cuda_kernels/prefill_hopper.cu`, with its memory."""

    def __init__(
        self,
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
    ) -> None:
        tokens, heads, dim = q.shape
        blocks, kv_heads, block_size, _ = key_cache.shape
        sequences = len(context_lens) - first_sequence
        full_tiles, self._num_sms = kv_heads * (tokens * (heads // kv_heads) // _ROWS), devices.num_sms(q.device.index)
        seen = min(max_context_len, sliding_window + _ROWS) if sliding_window else max_context_len
        slots = prefill_split.num_slots(sequences, full_tiles, seen, self._num_sms)
        parts = prefill_split.new_parts(slots, _ROWS, dim, q.device) if slots else out
        tiles = full_tiles + kv_heads * sequences  # of the sequences before, not all need have a query
        self._stream = torch.cuda.current_stream(q.device).cuda_stream
        counters = kept(_new_counters, q.device.index, self._stream)
        self._held = (q, out, parts, counters)
        self._arguments = (
            _TYPES[q.dtype], q.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), block_tables.data_ptr(),
            query_starts.data_ptr(), context_lens.data_ptr(), out.data_ptr(), counters.data_ptr(), parts.data_ptr(), slots,
            q.stride(0), block_tables.stride(0), heads, kv_heads, dim, block_size.bit_length() - 1, blocks, first_sequence, sequences,
            tiles, sliding_window, scale,
        )  # fmt: skip

    def launch(self, *, beside: bool) -> None:
        """`beside`: it may start while the decode attention ahead of it works (which was told AFTER_WAIT)."""
        library.call("gantline_prefill_hopper", *self._arguments, beside, self._num_sms, self._stream)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.Tensor:
    if has_few_rows_linear(x, weight) and library.load() is not None:
        return few_rows_linear(x, weight, bias, out_dtype)
    if out_dtype in (None, x.dtype) and has_split_linear(x, weight) and _has_hopper_kernels(x.device):
        return split_linear(x, weight, bias)
    if has_batch_linear(x, weight) and _has_hopper_kernels(x.device):
        return batch_linear(x, weight, bias, out_dtype)
    return triton_backend.linear(x, weight, bias, out_dtype)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if has_few_rows_linear(x, weight) and library.load() is not None:
        return few_rows_gated_linear(x, weight, bias)
    if has_gated_linear(x, weight) and _has_hopper_kernels(x.device):
        return hopper_gated_linear(x, weight, bias)
    return silu_and_mul(linear(x, weight, bias, None))


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    run = hopper_sample if fits_hopper_sample(logits) and _has_hopper_kernels(logits.device) else triton_backend.sample
    return run(logits, uniforms, temperature, top_k, top_p, min_p)


def _has_hopper_kernels(device: torch.device) -> bool:
    return _capability(device.index) == _HOPPER and library.load() is not None
