"""Every operation of the engine, named once: shapes, types, checks, and the choice of the implementation.

    select("auto", "cuda")                       -> "cuda": the backend's name, decided once when the engine starts
    rms_norm(x, weight, 1e-6, backend="triton")  -> runs that backend's kernel

Backends: `torch` (plain torch, any device), `triton` (any GPU that Triton knows; a CPU under TRITON_INTERPRET=1), `cuda` (CUDA C++ where
it wins, Triton's kernels elsewhere). `reference.py` has the same operations in float32, as plain as they can be written.

Letters: T tokens of a step, one sequence after the other; B sequences; Hq query heads; Hkv key/value heads (Hq is a multiple); D head
dimension; S sampled rows; V vocabulary. Tensors of floating point have the model's type unless said otherwise. Rows may have any stride,
their elements lie side by side.

On a GPU, `triton` and `cuda` never wait for the device, and what they allocate follows from shapes and host integers alone: they can be
captured in CUDA graphs, as long as `max_query_len` and `max_context_len` bound all replays. (`torch` reads lengths on the host.)

Wrong shapes or types raise ValueError. Values on the device (block numbers, positions, tokens) are the caller's duty.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch

from gantline_kernels.invariance import Products
from gantline_kernels.shared_prefix import SharedPrefixes

__all__ = [
    "BACKENDS",
    "HEAD_DIMS",
    "INVARIANT",
    "INVARIANT_TRITON",
    "Products",
    "SharedPrefixes",
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
    "select",
    "select_invariant",
    "silu_and_mul",
    "token_logprobs",
]

BACKENDS = ("torch", "triton", "cuda")
INVARIANT, INVARIANT_TRITON = "invariant", "invariant_triton"
"""Backends, for CPUs and for GPUs, whose results for a row depend on that row alone; slower, and chosen by `select_invariant` only
(`EngineConfig.batch_invariant`)."""
HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)
"""Head dimensions that attention is built for. 64, 96, 128 and 256 are tested on every backend; others are padded inside."""

_AWQ_PACK = 8
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def select(backend: str, device: torch.device | str) -> str:
    """The backend's name for `backend` ("auto" or one of BACKENDS) on `device`: for "auto" `cuda` on NVIDIA GPUs of compute capability
    8.0 and newer, `triton` on other GPUs but those older than 8.0 (`torch`), `torch` elsewhere.

    Raises ValueError for an unknown name, and for `cuda` without a GPU.
    """
    kind = torch.device(device).type
    if backend == "auto":
        return _automatic(kind)
    _require(backend in BACKENDS, f"backend is {backend!r}, expected auto or one of {', '.join(BACKENDS)}")
    _require(backend != "cuda" or kind == "cuda", f"the cuda backend needs a GPU, not the device {kind!r}")
    return backend


def select_invariant(backend: str, device: torch.device | str) -> str:
    """The backend whose rows depend on themselves alone, in the place of `backend` (one of BACKENDS) on `device`.

    Raises ValueError where there is none: for `torch` on a GPU, for `cuda` and `triton` on a CPU (but `triton` under its interpreter).
    """
    kind = torch.device(device).type
    on_gpu = kind == "cuda" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
    _require(on_gpu == (backend != "torch"), f"the {backend} backend does not have it on the device {kind!r}")
    return INVARIANT_TRITON if on_gpu else INVARIANT


def _automatic(kind: str) -> str:
    if kind != "cuda":
        return "torch"
    if torch.version.hip:
        return "triton"
    return "cuda" if torch.cuda.get_device_capability() >= (8, 0) else "torch"


@cache
def _implementation(backend: str) -> Any:
    known = (*BACKENDS, INVARIANT, INVARIANT_TRITON)
    _require(backend in known, f"backend is {backend!r}, expected one of {', '.join(known)}")
    return importlib.import_module(f"gantline_kernels.{backend}_backend")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str) -> torch.Tensor:
    """x [T, N] / sqrt(mean(x^2) + eps) * weight [N] -> [T, N]; computed in float32."""
    _check_rows("rms_norm", x, weight.shape[0])
    return _implementation(backend).rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, N]. The sum is rounded to the type of x before it is normed, as in the models.

    x and residual may be overwritten: do not use them afterwards.
    """
    _check_rows("add_rms_norm", x, weight.shape[0])
    _require(residual.shape == x.shape, f"add_rms_norm: residual is {list(residual.shape)}, expected {list(x.shape)}")
    return _implementation(backend).add_rms_norm(x, residual, weight, eps)


def silu_and_mul(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    """silu(gate) * up -> [T, I], of x [T, 2 I] = gate, then up; computed in float32."""
    _require(x.dim() == 2 and x.shape[1] % 2 == 0, f"silu_and_mul: x is {list(x.shape)}, expected [T, 2 I]")
    return _implementation(backend).silu_and_mul(x)


def rope_and_cache_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str,
) -> torch.Tensor:
    """Norm (where weights [D] are given) and rotate queries and keys, write keys and values to the cache -> rotated q [T, Hq, D].

    q [T, Hq, D], k and v [T, Hkv, D], views of one matrix will do; q may be overwritten: use the result. cos_sin float32 [P, D]: cosines of
    the first half of the dimensions, then sines (dimension i turns with i + D/2). positions int32 or int64 [T]. Caches
    [blocks, Hkv, block_size, D]. slots int64 [T]: block * block_size + offset, -1: not written.
    """
    tokens, _, dim = q.shape
    _require(k.shape == v.shape and k.shape[0] == tokens and k.shape[2] == dim, f"rope: k is {list(k.shape)}, v {list(v.shape)}")
    _require(k.shape[0] == tokens, f"rope: {tokens} queries, {k.shape[0]} keys")
    _require(cos_sin.dim() == 2 and cos_sin.shape[1] == dim and cos_sin.dtype == torch.float32, "rope: cos_sin must be float32 [P, D]")
    _require(positions.shape == slots.shape == (tokens,), "rope: positions and slots must be [T]")
    _require(slots.dtype == torch.int64, f"rope: slots are {slots.dtype}, expected int64")
    _check_caches("rope", key_cache, value_cache, k.shape[1], dim)
    return _implementation(backend).rope_and_cache_write(
        q, k, v, cos_sin, positions, key_cache, value_cache, slots, q_norm_weight, k_norm_weight, eps
    )


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
    backend: str,
) -> torch.Tensor:
    """Causal attention of new tokens over their sequences' cached keys and values, the new ones among them -> [T, Hq, D].

    q [T, Hq, D]; caches [blocks, Hkv, block_size, D]; block_tables int32 [B, M]; query_starts int32 [B + 1]; context_lens int32 [B]: tokens
    in the cache including the new ones, at least the sequence's query length. The last query of a sequence sees its whole context, earlier
    ones correspondingly less. The first `num_decodes` sequences have one query each. Padding: the last of these, and the last of all, may
    have no query, and then have a context of 0. `max_query_len` and `max_context_len` are upper bounds. sliding_window W > 0: a query sees
    itself and the W - 1 tokens before. logit_softcap c > 0: scores become c * tanh(score / c).
    Entries of block_tables past a sequence's length mean nothing. Rows of q that no sequence covers (padding) give undefined results.
    `shared` says which of the first `num_decodes` contexts begin alike, so that what they share is read once; results differ by rounding
    only. Within a sliding window it is not used, since little of a prefix is seen there.
    """
    _, heads, dim = q.shape
    batch = context_lens.shape[0]
    _check_caches("paged_attention", key_cache, value_cache, key_cache.shape[1], dim)
    _require(heads % key_cache.shape[1] == 0, f"paged_attention: {heads} query heads over {key_cache.shape[1]} key/value heads")
    _require(dim in HEAD_DIMS, f"paged_attention: head dimension {dim} is not among {HEAD_DIMS}")
    _require(query_starts.shape == (batch + 1,) and block_tables.shape[0] == batch, "paged_attention: B differs between its inputs")
    for name, tensor in (("block_tables", block_tables), ("query_starts", query_starts), ("context_lens", context_lens)):
        _require(tensor.dtype == torch.int32, f"paged_attention: {name} is {tensor.dtype}, expected int32")
    _require(0 <= num_decodes <= batch, f"paged_attention: num_decodes is {num_decodes} of {batch} sequences")
    capacity = block_tables.shape[1] * key_cache.shape[2]
    _require(max_context_len <= capacity, f"paged_attention: contexts of {max_context_len} tokens, tables for {capacity}")
    _require(sliding_window >= 0 and logit_softcap >= 0, "paged_attention: sliding_window and logit_softcap must not be negative")
    if shared is not None:
        _check_shared(shared, num_decodes, key_cache.shape[2])
    return _implementation(backend).paged_attention(
        q, key_cache, value_cache, block_tables, query_starts, context_lens, scale,
        max_query_len, max_context_len, num_decodes, sliding_window, logit_softcap, None if sliding_window else shared,
    )  # fmt: skip


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str,
) -> torch.Tensor:
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N], accumulated in float32, in the type of x or in `out_dtype` (float32 for logits)."""
    _check_rows("linear", x, weight.shape[1])
    _require(out_dtype in (None, x.dtype, torch.float32), f"linear: out_dtype is {out_dtype}, expected {x.dtype} or float32")
    return _implementation(backend).linear(x, weight, bias, out_dtype)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str) -> torch.Tensor:
    """silu(gate) * up -> [T, I] in the type of x, of gate, then up = x [T, K] @ weight [2 I, K]^T + bias [2 I].

    Whether gate and up are rounded to the type of x in between is the implementation's choice, which may depend on T.
    """
    _check_rows("gated_linear", x, weight.shape[1])
    _require(weight.shape[0] % 2 == 0, f"gated_linear: weight is {list(weight.shape)}, expected [2 I, K]")
    return _implementation(backend).gated_linear(x, weight, bias)


def awq_dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int, *, backend: str) -> torch.Tensor:
    """(q - zero) * scale -> [K, N] in the type of `scales`, from AWQ's `gemm` layout.

    qweight int32 [K, N / 8], qzeros int32 [K / group_size, N / 8], scales [K / group_size, N]. Eight columns share a word; column c of
    eight lies in bits 4 * (0, 4, 1, 5, 2, 6, 3, 7)[c] and up.
    """
    _check_awq(qweight, qzeros, scales, group_size)
    return _implementation(backend).awq_dequantize(qweight, qzeros, scales, group_size)


def awq_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None = None,
    *,
    backend: str,
) -> torch.Tensor:
    """x [T, K] @ awq_dequantize(...) [K, N] + bias [N] -> [T, N], accumulated in float32."""
    _check_awq(qweight, qzeros, scales, group_size)
    _check_rows("awq_linear", x, qweight.shape[0])
    return _implementation(backend).awq_linear(x, qweight, qzeros, scales, group_size, bias)


def argmax(logits: torch.Tensor, *, backend: str) -> torch.Tensor:
    """Index of the largest of each row of logits [S, V] (the first of equals) -> int64 [S]."""
    _require(logits.dim() == 2 and logits.shape[1] > 0, f"argmax: logits are {list(logits.shape)}, expected [S, V]")
    return _implementation(backend).argmax(logits)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor, *, backend: str) -> None:
    """Sets, in place, what a mask forbids to -inf: in row rows[i] of logits [S, V] the tokens whose bit in allowed[i] is 0.

    rows int64 [M], each at most once; allowed int32 [M, ceil(V / 32)], token t being bit t % 32 of word t // 32. Other rows stay.
    """
    _require(logits.dim() == 2 and logits.stride(1) == 1, f"mask_tokens: logits are {list(logits.shape)}, expected [S, V], rows contiguous")
    shape = (len(rows), -(-logits.shape[1] // 32))
    _require(allowed.shape == shape and allowed.is_contiguous(), f"mask_tokens: allowed is {list(allowed.shape)}, expected {list(shape)}")
    _require(allowed.dtype == torch.int32 and rows.dtype == torch.int64, "mask_tokens: rows must be int64 and allowed int32")
    _implementation(backend).mask_tokens(logits, rows, allowed)


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    *,
    backend: str,
) -> torch.Tensor:
    """One token of each row of logits [S, V] -> int64 [S].

    Rows with temperature 0 take the largest logit. Others take softmax(logits / temperature), keep the top_k likeliest (0: all; equals of
    the k-th are kept too), of those (renormalised) the fewest whose probabilities reach top_p (equals of the last are kept too), of those
    the ones of at least min_p times the likeliest, and take the first token, in order of token number, at which the cumulative sum
    exceeds the row's uniform in [0, 1) times the total. A row's result depends on nothing but the row. temperature, top_p, min_p and
    uniforms float32 [S], top_k int32 or int64 [S]; None: no limit. Forbidden tokens have logit -inf; one token at least must be allowed.
    """
    _require(logits.dim() == 2 and logits.shape[1] > 0, f"sample: logits are {list(logits.shape)}, expected [S, V]")
    for name, tensor in (("uniforms", uniforms), ("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        _require(tensor is None or tensor.shape == logits.shape[:1], f"sample: {name} must be [S]")
    return _implementation(backend).sample(logits, uniforms, temperature, top_k, top_p, min_p)


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, of logits [S, V]: those of tokens int64 [S] -> float32 [S]; the `count` largest of each row: tokens int64
    [S, count], and float32 [S, count]. A row's elements lie side by side."""
    _require(logits.dim() == 2 and logits.stride(1) == 1, f"token_logprobs: logits are {list(logits.shape)}, expected rows side by side")
    _require(tokens.shape == logits.shape[:1] and tokens.dtype == torch.int64, "token_logprobs: tokens must be int64 [S]")
    _require(0 <= count <= logits.shape[1], f"token_logprobs: {count} of {logits.shape[1]} tokens")
    return _implementation(backend).token_logprobs(logits, tokens, count)


def find_variance(products: Products, *, backend: str) -> str:
    """Of a backend that `select_invariant` gave: which of a model's products depends on a row's place on this machine, or nothing."""
    found: str = _implementation(backend).find_variance(products)
    return found


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_rows(name: str, x: torch.Tensor, columns: int) -> None:
    _require(x.dim() == 2 and x.shape[1] == columns, f"{name}: x is {list(x.shape)}, expected [T, {columns}]")
    _require(x.dtype in _FLOATS, f"{name}: x is {x.dtype}, expected float32, bfloat16 or float16")


def _check_caches(name: str, keys: torch.Tensor, values: torch.Tensor, heads: int, dim: int) -> None:
    ok = keys.dim() == 4 and keys.shape == values.shape and keys.shape[1] == heads and keys.shape[3] == dim
    _require(ok, f"{name}: caches are {list(keys.shape)} and {list(values.shape)}, expected [blocks, {heads}, block_size, {dim}]")
    _require(keys.is_contiguous() and values.is_contiguous(), f"{name}: caches must be contiguous")


def _check_shared(shared: SharedPrefixes, num_decodes: int, block_size: int) -> None:
    for name, tensor in (("lens", shared.lens), ("members", shared.members), ("starts", shared.starts)):
        _require(tensor.dtype == torch.int32 and tensor.is_contiguous(), f"paged_attention: shared.{name} must be contiguous and int32")
    fits = shared.lens.shape == shared.members.shape == (num_decodes,)
    _require(fits, f"paged_attention: shared.lens and shared.members must be [{num_decodes}]")
    _require(num_decodes > 0 and shared.num_groups > 0, "paged_attention: shared prefixes without a sequence or a group")
    _require(shared.max_own_len > 0, f"paged_attention: shared.max_own_len is {shared.max_own_len}, expected 1 or more")
    _require(block_size % 16 == 0, f"paged_attention: blocks of {block_size} tokens cannot be shared, only multiples of 16")


def _check_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int) -> None:
    inputs, words = qweight.shape
    _require(qweight.dtype == qzeros.dtype == torch.int32, "awq: qweight and qzeros must be int32")
    _require(group_size > 0 and inputs % group_size == 0, f"awq: {inputs} inputs are no multiple of the group size {group_size}")
    groups = inputs // group_size
    _require(tuple(qzeros.shape) == (groups, words), f"awq: qzeros are {list(qzeros.shape)}, expected [{groups}, {words}]")
    expected = (groups, words * _AWQ_PACK)
    _require(tuple(scales.shape) == expected, f"awq: scales are {list(scales.shape)}, expected {list(expected)}")
