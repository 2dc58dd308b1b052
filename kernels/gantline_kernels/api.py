"""Every operation of the engine, named once: shapes, types, checks, and the choice of the implementation.

    select("auto", "cuda")                       -> "cuda": the backend's name, decided once when the engine starts
    rms_norm(x, weight, 1e-6, backend="triton")  -> runs that backend's kernel

Backends: `torch` (plain torch, any device), `triton` (any GPU that Triton knows; a CPU under TRITON_INTERPRET=1), `cuda` (CUDA C++ where
it wins, Triton's kernels elsewhere). `reference.py` has the same operations in float32, as plain as they can be written.

Letters: T tokens of a step, one sequence after the other; B sequences; Hq query heads; Hkv key/value heads (Hq is a multiple); D head
dimension; S sampled rows; V vocabulary. Tensors of floating point have the model's type unless said otherwise. Rows may have any stride,
their elements lie side by side. All tensors of a call are on one device; if it is a GPU, the current one.

On a GPU, `triton` and `cuda` never wait for the device, and what they allocate follows from shapes and host integers alone: they can be
captured in CUDA graphs, as long as `max_query_len` and `max_context_len` bound all replays. (`torch` reads lengths on the host.)

Wrong shapes, types, layouts and places raise ValueError (`arguments.py`). Values on the device (block numbers, positions, tokens) are the
caller's duty.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch

from gantline_kernels import arguments
from gantline_kernels.arguments import HEAD_DIMS, refuse
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


def select(backend: str, device: torch.device | str) -> str:
    """The backend's name for `backend` ("auto" or one of BACKENDS) on `device`: for "auto" `cuda` on NVIDIA GPUs of compute capability
    8.0 and newer, `triton` on other GPUs but those older than 8.0 (`torch`), `torch` elsewhere.

    Raises ValueError for an unknown name, and for `cuda` without a GPU.
    """
    kind = torch.device(device).type
    if backend == "auto":
        return _automatic(torch.device(device))
    if backend not in BACKENDS:
        refuse(f"backend is {backend!r}, expected auto or one of {', '.join(BACKENDS)}")
    if backend == "cuda" and kind != "cuda":
        refuse(f"the cuda backend needs a GPU, not the device {kind!r}")
    return backend


def select_invariant(backend: str, device: torch.device | str) -> str:
    """The backend whose rows depend on themselves alone, in the place of `backend` (one of BACKENDS) on `device`.

    Raises ValueError where there is none: for `torch` on a GPU, for `cuda` and `triton` on a CPU (but `triton` under its interpreter).
    """
    kind = torch.device(device).type
    on_gpu = kind == "cuda" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
    if on_gpu == (backend == "torch"):
        refuse(f"the {backend} backend does not have it on the device {kind!r}")
    return INVARIANT_TRITON if on_gpu else INVARIANT


def _automatic(device: torch.device) -> str:
    if device.type != "cuda":
        return "torch"
    if torch.version.hip:
        return "triton"
    return "cuda" if torch.cuda.get_device_capability(device) >= (8, 0) else "torch"


@cache
def _implementation(backend: str) -> Any:
    known = (*BACKENDS, INVARIANT, INVARIANT_TRITON)
    if backend not in known:
        refuse(f"backend is {backend!r}, expected one of {', '.join(known)}")
    return importlib.import_module(f"gantline_kernels.{backend}_backend")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str) -> torch.Tensor:
    """x [T, N] / sqrt(mean(x^2) + eps) * weight [N] -> [T, N]; computed in float32."""
    arguments.check_norm("rms_norm", x, weight)
    return _implementation(backend).rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, N]. The sum is rounded to the type of x before it is normed, as in the models.

    x and residual may be overwritten: do not use them afterwards.
    """
    arguments.check_norm("add_rms_norm", x, weight)
    arguments.check_rows("add_rms_norm", residual, x.shape[1], label="residual")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        refuse(f"add_rms_norm: residual is {residual.dtype} {list(residual.shape)}, expected {x.dtype} {list(x.shape)}")
    return _implementation(backend).add_rms_norm(x, residual, weight, eps)


def silu_and_mul(x: torch.Tensor, *, backend: str) -> torch.Tensor:
    """silu(gate) * up -> [T, I], of x [T, 2 I] = gate, then up; computed in float32."""
    if x.dim() != 2 or x.shape[1] % 2:
        refuse(f"silu_and_mul: x is {list(x.shape)}, expected [T, 2 I]")
    arguments.check_rows("silu_and_mul", x, x.shape[1])
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
    [blocks, Hkv, block_size, D] of any floating type, block_size a power of two, 16 or more. slots int64 [T]: block * block_size + offset,
    -1: not written.
    """
    norms = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    arguments.check_rope(q, k, v, cos_sin, positions, key_cache, value_cache, slots, norms)
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

    q [T, Hq, D]; caches [blocks, Hkv, block_size, D], block_size a power of two, 16 or more; block_tables int32 [B, M]; query_starts int32
    [B + 1]; context_lens int32 [B]: tokens in the cache including the new ones, at least the sequence's query length. The last query of a
    sequence sees its whole context, earlier ones correspondingly less. The first `num_decodes` sequences have one query each. Padding: the
    last of these, and the last of all, may have no query, and then have a context of 0. `max_query_len` and `max_context_len` are upper
    bounds. sliding_window W > 0: a query sees itself and the W - 1 tokens before. logit_softcap c > 0: scores become c * tanh(score / c).
    Entries of block_tables past a sequence's length mean nothing. Rows of q that no sequence covers (padding) give undefined results.
    `shared` says which of the first `num_decodes` contexts begin alike, so that what they share is read once; results differ by rounding
    only. Within a sliding window it is not used, since little of a prefix is seen there.
    """
    arguments.check_attention(
        q, key_cache, value_cache, block_tables, query_starts, context_lens, max_context_len, num_decodes, shared
    )  # fmt: skip
    if sliding_window < 0 or logit_softcap < 0:
        refuse("paged_attention: sliding_window and logit_softcap must not be negative")
    if not len(q):
        return torch.empty_like(q)
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
    """x [T, K] @ weight [N, K]^T + bias [N] -> [T, N], accumulated in float32, in the type of x or in `out_dtype` (float32 for logits).

    On a CPU, results have been rounded to the type of x before they are given `out_dtype`.
    """
    arguments.check_weight("linear", x, weight)
    arguments.check_bias("linear", x, bias, weight.shape[0])
    if out_dtype not in (None, x.dtype, torch.float32):
        refuse(f"linear: out_dtype is {out_dtype}, expected {x.dtype} or float32")
    return _implementation(backend).linear(x, weight, bias, out_dtype)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str) -> torch.Tensor:
    """silu(gate) * up -> [T, I] in the type of x, of gate, then up = x [T, K] @ weight [2 I, K]^T + bias [2 I].

    Whether gate and up are rounded to the type of x in between is the implementation's choice, which may depend on T.
    """
    arguments.check_weight("gated_linear", x, weight)
    arguments.check_bias("gated_linear", x, bias, weight.shape[0])
    if weight.shape[0] % 2:
        refuse(f"gated_linear: weight is {list(weight.shape)}, expected [2 I, K]")
    return _implementation(backend).gated_linear(x, weight, bias)


def awq_dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int, *, backend: str) -> torch.Tensor:
    """(q - zero) * scale -> [K, N] in the type of `scales`, from AWQ's `gemm` layout.

    qweight int32 [K, N / 8], qzeros int32 [K / group_size, N / 8], scales [K / group_size, N]. Eight columns share a word; column c of
    eight lies in bits 4 * (0, 4, 1, 5, 2, 6, 3, 7)[c] and up.
    """
    arguments.check_awq("awq_dequantize", qweight, qzeros, scales, group_size)
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
    arguments.check_awq("awq_linear", qweight, qzeros, scales, group_size)
    arguments.check_rows("awq_linear", x, qweight.shape[0])
    arguments.check_bias("awq_linear", x, bias, scales.shape[1])
    return _implementation(backend).awq_linear(x, qweight, qzeros, scales, group_size, bias)


def argmax(logits: torch.Tensor, *, backend: str) -> torch.Tensor:
    """Index of the largest of each row of logits [S, V] (the first of equals) -> int64 [S]."""
    arguments.check_logits("argmax", logits)
    return _implementation(backend).argmax(logits)


def mask_tokens(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor, *, backend: str) -> None:
    """Sets, in place, what a mask forbids to -inf: in row rows[i] of logits [S, V] the tokens whose bit in allowed[i] is 0.

    rows int64 [M], each at most once; allowed int32 [M, ceil(V / 32)], token t being bit t % 32 of word t // 32. Other rows stay.
    """
    arguments.check_mask(logits, rows, allowed)
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
    arguments.check_sampling(logits, uniforms, temperature, top_k, top_p, min_p)
    return _implementation(backend).sample(logits, uniforms, temperature, top_k, top_p, min_p)


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, count: int, *, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, of logits [S, V]: those of tokens int64 [S] -> float32 [S]; the `count` largest of each row: tokens int64
    [S, count], and float32 [S, count]. A row's elements lie side by side."""
    arguments.check_logits("token_logprobs", logits)
    if tokens.shape != logits.shape[:1] or tokens.dtype != torch.int64:
        refuse(f"token_logprobs: tokens are {tokens.dtype} {list(tokens.shape)}, expected torch.int64 [{logits.shape[0]}]")
    if not 0 <= count <= logits.shape[1]:
        refuse(f"token_logprobs: {count} of {logits.shape[1]} tokens")
    return _implementation(backend).token_logprobs(logits, tokens, count)


def find_variance(products: Products, *, backend: str) -> str:
    """Of a backend that `select_invariant` gave: which of a model's products depends on a row's place on this machine, or nothing."""
    found: str = _implementation(backend).find_variance(products)
    return found
