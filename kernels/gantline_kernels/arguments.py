"""What each operation of `api.py` may be given: shapes, types, layout, places. Everything here raises ValueError that says what was given
and what is expected.

Kernels get addresses: what these let through, they believe. Texts are made only where something is wrong, since all this runs before every
launch, hundreds of times in a step without a graph. Values on the device are not looked at.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from gantline_kernels.shared_prefix import SharedPrefixes

__all__ = [
    "HEAD_DIMS",
    "check_attention",
    "check_awq",
    "check_bias",
    "check_logits",
    "check_mask",
    "check_norm",
    "check_rope",
    "check_rows",
    "check_sampling",
    "check_weight",
    "refuse",
]

HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)
"""Head dimensions that attention is built for. 64, 96, 128 and 256 are tested on every backend; others are padded inside."""

Types = tuple[torch.dtype, ...]
_FLOATS: Types = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32: Types = (torch.float32,)
_INT32: Types = (torch.int32,)
_INT64: Types = (torch.int64,)
_INTEGERS: Types = (torch.int32, torch.int64)
_AWQ_PACK = 8
_LEAST_BLOCK = 16
_ALIGNMENT = 16
"""Bytes: what the copy engine and the widest loads ask of a cache's address."""


def refuse(message: str) -> NoReturn:
    raise ValueError(message)


def check_rows(name: str, x: torch.Tensor, columns: int, *, label: str = "x") -> None:
    """x [T, columns] of floats, the elements of a row side by side."""
    if x.dim() != 2 or x.shape[1] != columns:
        refuse(f"{name}: {label} is {list(x.shape)}, expected [T, {columns}]")
    _check_type(name, label, x, _FLOATS)
    _check_rows_are_whole(name, label, x)


def _check_rows_are_whole(name: str, label: str, x: torch.Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        refuse(f"{name}: the elements of a row of {label} lie {x.stride(-1)} apart, expected side by side: give {label}.contiguous()")


def _check_type(name: str, label: str, x: torch.Tensor, types: Types) -> None:
    if x.dtype not in types:
        refuse(f"{name}: {label} is {x.dtype}, expected {' or '.join(map(str, types))}")


def _check_place(name: str, label: str, x: torch.Tensor, other: torch.Tensor) -> None:
    if x.device != other.device:
        refuse(f"{name}: {label} is on {x.device}, the rest on {other.device}: move it there")


def _check_vector(name: str, label: str, x: torch.Tensor, size: int, types: Types, other: torch.Tensor) -> None:
    """x [size] of one of `types`, contiguous, on the device of `other`."""
    if x.dim() != 1 or x.shape[0] != size:
        refuse(f"{name}: {label} is {list(x.shape)}, expected [{size}]")
    _check_type(name, label, x, types)
    _check_place(name, label, x, other)
    if not x.is_contiguous():
        refuse(f"{name}: the elements of {label} lie {x.stride(0)} apart, expected side by side: give {label}.contiguous()")


def check_norm(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    check_rows(name, x, weight.shape[-1])
    _check_vector(name, "weight", weight, x.shape[1], (x.dtype,), x)


def check_weight(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """weight [N, K] of the type and on the device of x [T, K]."""
    if weight.dim() != 2:
        refuse(f"{name}: weight is {list(weight.shape)}, expected [N, K]")
    check_rows(name, x, weight.shape[1])
    _check_type(name, "weight", weight, (x.dtype,))
    _check_place(name, "weight", weight, x)


def check_bias(name: str, x: torch.Tensor, bias: torch.Tensor | None, outputs: int) -> None:
    if bias is not None:
        _check_vector(name, "bias", bias, outputs, (x.dtype,), x)


def check_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    norms: dict[str, torch.Tensor | None],
) -> None:
    """See `api.rope_and_cache_write`."""
    if q.dim() != 3 or q.shape[2] % 2:
        refuse(f"rope: q is {list(q.shape)}, expected [T, Hq, D] with an even D")
    tokens, _, dim = q.shape
    if k.dim() != 3 or k.shape != v.shape or k.shape[2] != dim:
        refuse(f"rope: k is {list(k.shape)}, v {list(v.shape)}, expected [T, Hkv, {dim}] both")
    if k.shape[0] != tokens:
        refuse(f"rope: {tokens} queries, {k.shape[0]} keys")
    _check_type("rope", "q", q, _FLOATS)
    for label, x in (("k", k), ("v", v)):
        _check_type("rope", label, x, (q.dtype,))
    if cos_sin.dim() != 2 or cos_sin.shape[1] != dim or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        refuse(f"rope: cos_sin is {cos_sin.dtype} {list(cos_sin.shape)}, expected contiguous torch.float32 [P, {dim}]")
    _check_vector("rope", "positions", positions, tokens, _INTEGERS, q)
    _check_vector("rope", "slots", slots, tokens, _INT64, q)
    for label, norm in norms.items():
        if norm is not None:
            _check_vector("rope", label, norm, dim, _FLOATS, q)
    _check_caches("rope", key_cache, value_cache, k.shape[1], dim, q)


def check_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    num_decodes: int,
    shared: SharedPrefixes | None,
) -> None:
    """See `api.paged_attention`."""
    name = "paged_attention"
    if q.dim() != 3 or q.shape[2] not in HEAD_DIMS:
        refuse(f"{name}: q is {list(q.shape)}, expected [T, Hq, D] with a head dimension D among {HEAD_DIMS}")
    _, heads, dim = q.shape
    _check_type(name, "q", q, _FLOATS)
    _check_caches(name, key_cache, value_cache, None, dim, q)
    _check_type(name, "key_cache", key_cache, (q.dtype,))
    kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    if heads % kv_heads:
        refuse(f"{name}: {heads} query heads over {kv_heads} key/value heads")
    batch = context_lens.shape[0]
    _check_vector(name, "context_lens", context_lens, batch, _INT32, q)
    _check_vector(name, "query_starts", query_starts, batch + 1, _INT32, q)
    if block_tables.dim() != 2 or block_tables.shape[0] != batch:
        refuse(f"{name}: block_tables are {list(block_tables.shape)}, expected [{batch}, M]")
    _check_type(name, "block_tables", block_tables, _INT32)
    _check_place(name, "block_tables", block_tables, q)
    _check_rows_are_whole(name, "block_tables", block_tables)
    if not 0 <= num_decodes <= batch:
        refuse(f"{name}: num_decodes is {num_decodes} of {batch} sequences")
    capacity = block_tables.shape[1] * block_size
    if max_context_len > capacity:
        refuse(f"{name}: contexts of {max_context_len} tokens, tables for {capacity}")
    if shared is not None:
        _check_shared(shared, num_decodes, q)


def _check_caches(name: str, keys: torch.Tensor, values: torch.Tensor, heads: int | None, dim: int, other: torch.Tensor) -> None:
    """[blocks, heads, block_size, dim] both, contiguous, blocks of a power of two; `heads` None: any number."""
    if keys.dim() != 4 or keys.shape != values.shape or keys.shape[3] != dim or (heads is not None and keys.shape[1] != heads):
        expected = f"[blocks, {'Hkv' if heads is None else heads}, block_size, {dim}]"
        refuse(f"{name}: caches are {list(keys.shape)} and {list(values.shape)}, expected {expected}")
    block_size = keys.shape[2]
    if block_size < _LEAST_BLOCK or block_size & (block_size - 1):
        refuse(f"{name}: caches have blocks of {block_size} tokens, expected a power of two, {_LEAST_BLOCK} or more")
    if values.dtype != keys.dtype:
        refuse(f"{name}: value_cache is {values.dtype}, key_cache {keys.dtype}")
    if not keys.is_contiguous() or not values.is_contiguous():
        refuse(f"{name}: caches must be contiguous")
    if keys.data_ptr() % _ALIGNMENT or values.data_ptr() % _ALIGNMENT:
        refuse(f"{name}: caches must begin at multiples of {_ALIGNMENT} bytes")
    _check_place(name, "key_cache", keys, other)
    _check_place(name, "value_cache", values, other)


def _check_shared(shared: SharedPrefixes, num_decodes: int, other: torch.Tensor) -> None:
    name = "paged_attention"
    for label, x in (("lens", shared.lens), ("members", shared.members), ("starts", shared.starts)):
        if x.dtype != torch.int32 or not x.is_contiguous():
            refuse(f"{name}: shared.{label} must be contiguous and int32")
        _check_place(name, f"shared.{label}", x, other)
    if not shared.lens.shape == shared.members.shape == (num_decodes,):
        refuse(f"{name}: shared.lens and shared.members must be [{num_decodes}]")
    if num_decodes == 0 or shared.num_groups <= 0:
        refuse(f"{name}: shared prefixes without a sequence or a group")
    if shared.max_own_len <= 0:
        refuse(f"{name}: shared.max_own_len is {shared.max_own_len}, expected 1 or more")


def check_awq(name: str, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int) -> None:
    if qweight.dim() != 2 or qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
        refuse(f"{name}: qweight is {qweight.dtype} {list(qweight.shape)}, qzeros {qzeros.dtype}, expected torch.int32, [K, N / 8]")
    inputs, words = qweight.shape
    if group_size <= 0 or inputs % group_size:
        refuse(f"{name}: {inputs} inputs are no multiple of the group size {group_size}")
    groups = inputs // group_size
    if qzeros.shape != (groups, words):
        refuse(f"{name}: qzeros are {list(qzeros.shape)}, expected [{groups}, {words}]")
    if scales.shape != (groups, words * _AWQ_PACK):
        refuse(f"{name}: scales are {list(scales.shape)}, expected [{groups}, {words * _AWQ_PACK}]")
    _check_type(name, "scales", scales, _FLOATS)
    for label, x in (("qzeros", qzeros), ("scales", scales)):
        _check_place(name, label, x, qweight)


def check_logits(name: str, logits: torch.Tensor) -> None:
    """[S, V] of floats, V of one at least, the elements of a row side by side."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        refuse(f"{name}: logits are {list(logits.shape)}, expected [S, V]")
    _check_type(name, "logits", logits, _FLOATS)
    _check_rows_are_whole(name, "logits", logits)


def check_mask(logits: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor) -> None:
    """See `api.mask_tokens`."""
    check_logits("mask_tokens", logits)
    _check_vector("mask_tokens", "rows", rows, len(rows), _INT64, logits)
    shape = (len(rows), -(-logits.shape[1] // 32))
    if allowed.shape != shape or not allowed.is_contiguous():
        refuse(f"mask_tokens: allowed is {list(allowed.shape)}, expected contiguous {list(shape)}")
    _check_type("mask_tokens", "allowed", allowed, _INT32)
    _check_place("mask_tokens", "allowed", allowed, logits)


def check_sampling(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> None:
    """See `api.sample`."""
    check_logits("sample", logits)
    rows = logits.shape[0]
    for label, x in (("uniforms", uniforms), ("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        if x is not None:
            _check_vector("sample", label, x, rows, _FLOAT32, logits)
    if top_k is not None:
        _check_vector("sample", "top_k", top_k, rows, _INTEGERS, logits)
