"""The operations on NVIDIA GPUs: CUDA C++ where it wins and is built, Triton's kernels elsewhere. Checks are in `api.py`."""

from __future__ import annotations

from functools import cache

import torch

from gantline_kernels import library, triton_backend
from gantline_kernels.shared_prefix import SharedPrefixes
from gantline_kernels.triton_backend import (
    add_rms_norm,
    argmax,
    awq_dequantize,
    awq_linear,
    mask_tokens,
    rms_norm,
    rope_and_cache_write,
    sample,
    silu_and_mul,
)
from gantline_kernels.triton_kernels.decode import decode_attention
from gantline_kernels.triton_kernels.prefill import prefill_attention

__all__ = [
    "add_rms_norm",
    "argmax",
    "awq_dequantize",
    "awq_linear",
    "linear",
    "mask_tokens",
    "paged_attention",
    "rms_norm",
    "rope_and_cache_write",
    "sample",
    "silu_and_mul",
]

_HOPPER = (9, 0)
_FEW_ROWS = 16
_EVEN_SHARE = 0.9
"""From 2 to so many rows our linear kernel is faster than cuBLAS, if its blocks keep the average multiprocessor so busy as the busiest
(docs/perf-log.md, "Linear layers, few rows"): bandwidth is shared evenly by multiprocessors, so the busiest ends last."""
_OUTPUTS, _CHUNK, _MAX_PARTS = 64, 64, 8
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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    if num_decodes:
        decode_attention(
            q[:num_decodes], key_cache, value_cache, block_tables, context_lens, out[:num_decodes],
            scale, max_context_len, sliding_window, logit_softcap, shared,
        )  # fmt: skip
    if num_decodes < len(context_lens):
        inputs = (q, key_cache, value_cache, block_tables, query_starts, context_lens, out)
        if _has_hopper_prefill(q, key_cache.shape[2], logit_softcap):
            _prefill_hopper(*inputs, scale, num_decodes, sliding_window)
        else:
            prefill_attention(*inputs, scale, num_decodes, sliding_window, logit_softcap)
    return out


def _has_hopper_prefill(q: torch.Tensor, block_size: int, logit_softcap: float) -> bool:
    fits = q.shape[2] in (64, 128) and q.dtype in _TYPES and block_size & (block_size - 1) == 0 and 16 <= block_size <= 1024
    aligned = q.stride(0) % 8 == 0 and q.data_ptr() % 16 == 0
    return fits and aligned and not logit_softcap and _capability(q.device.index) == _HOPPER and library.load() is not None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _counters(index: int, stream: int) -> torch.Tensor:
    """The prefill kernel's two numbers, zero between launches; of each stream its own, since launches of one stream follow each other."""
    return torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")


def _prefill_hopper(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    first_sequence: int,
    sliding_window: int,
) -> None:
    tokens, heads, dim = q.shape
    blocks, kv_heads, block_size, _ = key_cache.shape
    sequences = len(context_lens) - first_sequence
    tiles = kv_heads * (tokens * (heads // kv_heads) // _ROWS + sequences)  # of the sequences before, not all need have a query
    stream = torch.cuda.current_stream(q.device).cuda_stream
    library.call(
        "gantline_prefill_hopper", _TYPES[q.dtype], q.data_ptr(), key_cache.data_ptr(), value_cache.data_ptr(), block_tables.data_ptr(),
        query_starts.data_ptr(), context_lens.data_ptr(), out.data_ptr(), _counters(q.device.index, stream).data_ptr(),
        q.stride(0), block_tables.stride(0), heads, kv_heads, dim, block_size.bit_length() - 1, blocks, first_sequence, sequences, tiles,
        sliding_window, scale, _num_sms(q.device.index), stream,
    )  # fmt: skip


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None) -> torch.Tensor:
    if not _has_hopper_linear(x, weight):
        return triton_backend.linear(x, weight, bias, out_dtype)
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty((rows, outputs), dtype=out_dtype or x.dtype, device=x.device)
    parts = linear_parts(rows, inputs, outputs, _num_sms(x.device.index))
    library.call(
        "gantline_linear_hopper", _TYPES[x.dtype], x.data_ptr(), x.stride(0), weight.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), int(out.dtype == torch.float32), rows, inputs, outputs, parts, torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    return out


def _has_hopper_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    rows, (outputs, inputs) = x.shape[0], weight.shape
    if not 2 <= rows <= _FEW_ROWS or x.dtype not in _TYPES or weight.dtype != x.dtype:
        return False
    fits = outputs % _OUTPUTS == 0 and inputs % _CHUNK == 0 and weight.is_contiguous()
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    if not (fits and aligned and _capability(x.device.index) == _HOPPER and library.load() is not None):
        return False
    return spreads_evenly(rows, inputs, outputs, _num_sms(x.device.index))


@cache
def spreads_evenly(rows: int, inputs: int, outputs: int, num_sms: int) -> bool:
    """Whether the multiprocessors have about equally many blocks of the linear kernel."""
    blocks = outputs // _OUTPUTS * linear_parts(rows, inputs, outputs, num_sms)
    return blocks >= _EVEN_SHARE * num_sms * -(-blocks // num_sms)


@cache
def linear_parts(rows: int, inputs: int, outputs: int, num_sms: int) -> int:
    """Blocks that share 64 outputs: as many as still run all at once, four to a multiprocessor (three past 32 rows)."""
    slots = num_sms * (4 if rows <= 32 else 3)
    return max(1, min(_MAX_PARTS, slots // (outputs // _OUTPUTS), inputs // _CHUNK))
