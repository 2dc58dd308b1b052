"""How much memory a model needs on each of its GPUs, and into how many parts it may be split.

The planner calls these functions with what labels promise, the engine with what it measures: one formula, so the difference between
promise and measurement means something and is exported as a metric. With t = tensor parallelism, M = memory of one GPU:

    W/t * (1 + WEIGHT_OVERHEAD) + WORKSPACE + tokens * cache_bytes_per_token  <=  usable_share * M
    cache_bytes_per_token = 2 (keys and values) * layers * ceil(kv heads / t) * head_dim * bytes of an element

W is the checkpoint's real number of bytes, from the safetensors headers, not parameters times bits. All sizes are bytes of one GPU
(or of one process's share of a CPU pod). Pure, and imports no torch: the operator imports this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gantline_runtime.model_facts import ModelFacts, Quantization

__all__ = [
    "CPU_WORKSPACE_BYTES",
    "GIB",
    "MIN_SESSION_LEN",
    "STEP_TOKENS",
    "TENSOR_PARALLEL",
    "TYPICAL_CONCURRENCY",
    "TYPICAL_SESSION_LEN",
    "USABLE_SHARE",
    "WEIGHT_OVERHEAD",
    "WORKSPACE_BYTES",
    "MemoryEstimate",
    "awq_facts",
    "awq_weight_bytes",
    "cache_bytes_per_token",
    "estimate",
    "illegal_quantization",
    "legal_tensor_parallel",
    "linear_parameters",
    "load_seconds",
    "loaded_weight_bytes",
    "max_concurrency",
    "max_session_len",
    "required_cache_tokens",
    "workspace_bytes",
]

GIB = 1 << 30

TENSOR_PARALLEL = (1, 2, 4, 8)
"""Powers of two up to the GPUs of one common node; the heads of public models divide by them."""

WEIGHT_OVERHEAD = 1.05 * 1.02 - 1
"""5 % for the allocator's rounding and for tensors that every rank keeps whole (norms, replicated key/value projections), 2 % for the
padding of vocabulary shards. KAITO's estimator arrived at the same two factors from its users' failures."""

WORKSPACE_BYTES = int(2.3 * GIB)
"""Least that a GPU holds beside weights and cache: CUDA context and libraries (about 0.6 GiB), NCCL's buffers and captured graphs, and the
activations of a step of a small model."""

CPU_WORKSPACE_BYTES = GIB
"""The same for one process on a CPU, without activations: Python with torch is 0.55 GiB resident, the API and template processes beside it
0.1 (measured with the shipped model), the rest is the allocator's."""

STEP_TOKENS = 8192
"""Most tokens of one step (the engine's `max_prefill_token_num`)."""

USABLE_SHARE = 0.90
"""Share of a GPU's labelled memory that is promised; ECC, the driver and fragmentation take 3 to 8 %."""

TYPICAL_SESSION_LEN = 8192
TYPICAL_CONCURRENCY = 8
"""Without other wishes, a shape must hold the cache of eight sessions of 8192 tokens (or of the model's limit, where that is less)."""

MIN_SESSION_LEN = 256
"""A cache that cannot hold one session of this length serves nobody."""

_AWQ_PACK = 8  # 4-bit values in one int32; a shard's columns must be whole words
_CUDA_FIXED_BYTES = int(0.85 * GIB)  # context, libraries, captured graphs
_LOGITS_COPIES = 4  # logits in float32, their softmax, and what filters and penalties keep
_LOAD_BYTES_PER_S = 200e6  # a network volume's sequential read; local NVMe is ten times faster, and a promise must hold on the slow one
_LOAD_FIXED_S = {"cuda": 60.0, "cpu": 20.0}  # imports, CUDA context, first compilation, warm-up


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU. `total` is what is asked for, `capacity_tokens` what the cache can hold beside weights and workspace."""

    weights: int
    workspace: int
    cache: int
    total: int
    usable: int
    capacity_tokens: int
    cache_bytes_per_token: int

    @property
    def fits(self) -> bool:
        return self.total <= self.usable and self.cache <= self.capacity_tokens * self.cache_bytes_per_token


def cache_bytes_per_token(facts: ModelFacts, tp: int, kv_bytes: int) -> int:
    """Bytes of one token's keys and values in all layers on one of `tp` ranks.

    Heads that cannot be divided any further are replicated. A sliding window saves nothing: blocks are freed with their sequence.
    """
    return 2 * facts.num_layers * math.ceil(facts.num_kv_heads / tp) * facts.head_dim * kv_bytes


def estimate(
    facts: ModelFacts,
    *,
    tp: int,
    session_len: int,
    concurrency: int,
    dtype_bytes: int,
    kv_bytes: int,
    gpu_memory_bytes: int,
    usable_share: float = USABLE_SHARE,
    workspace_bytes: int = WORKSPACE_BYTES,
    cache_share: float = 1.0,
) -> MemoryEstimate:
    """Memory of one of `tp` GPUs when `concurrency` sessions of `session_len` tokens are cached.

    `dtype_bytes` is the width that unquantized weights have once loaded, `kv_bytes` that of a cached element, `gpu_memory_bytes` the
    memory of one GPU (labelled, or measured) of which `usable_share` counts. Of what weights and workspace leave of it, the cache takes
    at most `cache_share` (the engine's `cache_max_entry_count`).
    """
    weights = math.ceil(loaded_weight_bytes(facts, dtype_bytes) / tp * (1 + WEIGHT_OVERHEAD))
    token_bytes = cache_bytes_per_token(facts, tp, kv_bytes)
    cache = session_len * concurrency * token_bytes
    usable = int(gpu_memory_bytes * usable_share)
    beside = weights + workspace_bytes
    room = max(0, min(usable - beside, int(cache_share * (gpu_memory_bytes - beside))))
    return MemoryEstimate(
        weights=weights,
        workspace=workspace_bytes,
        cache=cache,
        total=weights + workspace_bytes + cache,
        usable=usable,
        capacity_tokens=room // token_bytes,
        cache_bytes_per_token=token_bytes,
    )


def workspace_bytes(facts: ModelFacts, *, tp: int, dtype_bytes: int, max_batch_size: int, device: str) -> int:
    """Bytes that one rank holds beside weights and cache; `device` is `cuda` or `cpu`.

    The activations of the largest step (two of the feed-forward's inner width and their product, four of the residual's, queries, keys and
    values twice), the logits of all requests, and on a CPU two unpacked matrices: its kernels have no other way to use packed weights.
    """
    heads = (facts.num_heads + 2 * facts.num_kv_heads) * facts.head_dim
    widths = (3 * facts.intermediate_size + 2 * heads) // tp + 4 * facts.hidden_size
    total = STEP_TOKENS * widths * dtype_bytes + _LOGITS_COPIES * max_batch_size * facts.vocab_size * 4
    if device == "cuda":
        return max(WORKSPACE_BYTES, total + _CUDA_FIXED_BYTES)
    unpacked = 4 * facts.hidden_size * facts.intermediate_size // tp * dtype_bytes if facts.quantization is not None else 0
    return CPU_WORKSPACE_BYTES + total + unpacked


def required_cache_tokens(session_len: int, max_batch_size: int) -> int:
    """Tokens the cache must hold for a plan to be worth making.

    One session of full length, and as many typical ones as run at once. Every one of `max_batch_size` at full length is not asked for:
    the cache is paged, and a 128k session length would put a small model on eight GPUs.
    """
    return max(session_len, min(session_len, TYPICAL_SESSION_LEN) * min(max_batch_size, TYPICAL_CONCURRENCY))


def max_session_len(facts: ModelFacts, capacity_tokens: int) -> int:
    """Longest session that a cache of `capacity_tokens` holds, at most the model's own limit, in tokens."""
    return max(0, min(facts.max_position_embeddings, capacity_tokens))


def max_concurrency(capacity_tokens: int, session_len: int) -> int:
    """Sessions of full length that a cache of `capacity_tokens` holds at once."""
    return capacity_tokens // session_len


def legal_tensor_parallel(facts: ModelFacts, tp: int) -> str | None:
    """None where `tp` ranks can share the model, else one clause that says why not."""
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    if tp > 1 and facts.family == "transformers":
        return f"transformers' own implementation runs {facts.architecture}, on one device"
    if heads % tp:
        return f"{heads} attention heads cannot be divided by {tp}"
    if kv_heads % tp and tp % kv_heads:
        return f"{kv_heads} key/value heads can be neither divided nor replicated over {tp}"
    if facts.intermediate_size % tp:
        return f"the intermediate size {facts.intermediate_size} cannot be divided by {tp}"
    return None if facts.quantization is None else _illegal_group_split(facts, facts.quantization, tp)


def _illegal_group_split(facts: ModelFacts, quantization: Quantization, tp: int) -> str | None:
    """Why the groups of the row-parallel layers (down and output projection) or packed columns do not split into `tp` shards."""
    group = quantization.group_size
    rows = {"intermediate size": facts.intermediate_size, "attention output": facts.num_heads * facts.head_dim}
    for name, size in rows.items():
        if size // tp % group:
            return f"the {name} {size} over {tp} is {size // tp}, not a multiple of the quantization group {group}"
    columns = {"intermediate size": facts.intermediate_size // tp, "key/value width": facts.head_dim * max(1, facts.num_kv_heads // tp)}
    for name, size in columns.items():
        if size % _AWQ_PACK:
            return f"the {name} over {tp} is {size}, not a multiple of the {_AWQ_PACK} weights in a packed word"
    return None


def illegal_quantization(facts: ModelFacts, group_size: int) -> str | None:
    """None where group-wise AWQ can be applied to the model, else one clause that says why not."""
    if facts.quantization is not None:
        return f"the checkpoint is quantized already ({facts.quantization.method}, {facts.quantization.bits} bit)"
    if facts.family == "transformers":
        return f"{facts.architecture} has no layer table for AWQ"
    attention = facts.num_heads * facts.head_dim
    sizes = {"hidden size": facts.hidden_size, "intermediate size": facts.intermediate_size, "attention output": attention}
    for name, size in sizes.items():
        if size % group_size:
            return f"the {name} {size} is not a multiple of the group size {group_size}"
    return None if facts.num_kv_heads * facts.head_dim % _AWQ_PACK == 0 else "the key/value projection's width is no multiple of 8"


def linear_parameters(facts: ModelFacts) -> int:
    """Weights of all layers' linear maps: query, key, value, output, gate, up, down. Embedding and head are not among them."""
    queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    return facts.num_layers * facts.hidden_size * (2 * queries + 2 * keys + 3 * facts.intermediate_size)


def _packed_bytes(parameters: int, bits: int, group_size: int) -> int:
    """Bytes of AWQ's `gemm` layout: packed weights, and for each group of a column a packed zero point and a float16 scale."""
    return math.ceil(parameters * (bits / 8 + (bits / 8 + 2) / group_size))


def awq_weight_bytes(facts: ModelFacts, *, bits: int = 4, group_size: int = 128) -> int:
    """Bytes of the checkpoint after AWQ, from facts before it: linear layers packed, all else in 16 bits."""
    linear = linear_parameters(facts)
    rest = max(0, facts.weight_bytes - linear * facts.dtype_bytes) // facts.dtype_bytes * 2
    return _packed_bytes(linear, bits, group_size) + rest


def awq_facts(facts: ModelFacts, *, bits: int = 4, group_size: int = 128, dtype: str = "float16") -> ModelFacts:
    """Facts that the AWQ artefact of this checkpoint will have; name, revision and fingerprint stay the source's."""
    return replace(
        facts,
        weight_bytes=awq_weight_bytes(facts, bits=bits, group_size=group_size),
        dtype=dtype,
        quantization=Quantization(method="awq", bits=bits, group_size=group_size, version="gemm"),
    )


def loaded_weight_bytes(facts: ModelFacts, dtype_bytes: int) -> int:
    """Bytes of the weights once loaded: unquantized tensors take `dtype_bytes` an element, packed ones stay as they are."""
    if facts.quantization is None:
        return facts.weight_bytes // facts.dtype_bytes * dtype_bytes
    packed = _packed_bytes(linear_parameters(facts), facts.quantization.bits, facts.quantization.group_size)
    rest = max(0, facts.weight_bytes - packed)
    return facts.weight_bytes - rest + rest // facts.dtype_bytes * dtype_bytes


def load_seconds(facts: ModelFacts, *, tp: int, device: str) -> float:
    """Seconds from the container's start to ready on a slow volume, for probes and deadlines; `device` is `cuda` or `cpu`.

    Ranks of one pod read the same files from the same volume, so more of them do not make it faster, but each starts a process.
    """
    return _LOAD_FIXED_S[device] + 5.0 * (tp - 1) + facts.weight_bytes / _LOAD_BYTES_PER_S
