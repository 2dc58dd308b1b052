"""How much memory a model needs on each of its GPUs, and into how many parts it may be split.

The planner calls these functions with what labels promise, the engine with what it measures: one formula, so the difference between
promise and measurement means something and is exported as a metric. With t = tensor parallelism, M = memory of one GPU:

    weights + context + reserved + tokens * cache_bytes_per_token  <=  usable_share * M
    weights  = (W/t + what every rank keeps whole) * (1 + WEIGHT_OVERHEAD)
    context  = CUDA, its libraries, NCCL's buffers: what the driver takes for a process
    reserved = activations of the largest step + CUDA graphs + sampling + tables, all from the model's shape (`reserved_bytes`)
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
    "EDIT_BYTES",
    "GIB",
    "GRAPH_LAYER_BYTES",
    "GRAPH_POOL_SLACK",
    "GRAPH_TOKENS",
    "MAX_GRAPHS",
    "MIN_SESSION_LEN",
    "STEP_TOKENS",
    "TENSOR_PARALLEL",
    "TYPICAL_CONCURRENCY",
    "TYPICAL_SESSION_LEN",
    "USABLE_SHARE",
    "WEIGHT_OVERHEAD",
    "MemoryEstimate",
    "awq_facts",
    "awq_weight_bytes",
    "cache_bytes_per_token",
    "context_bytes",
    "estimate",
    "illegal_quantization",
    "legal_tensor_parallel",
    "linear_parameters",
    "load_seconds",
    "loaded_weight_bytes",
    "max_concurrency",
    "max_session_len",
    "required_cache_tokens",
    "reserved_bytes",
    "weight_bytes",
    "workspace_bytes",
]

GIB = 1 << 30

TENSOR_PARALLEL = (1, 2, 4, 8)
"""Powers of two up to the GPUs of one common node; the heads of public models divide by them."""

WEIGHT_OVERHEAD = 0.01
"""For the allocator's rounding: tensors of 10 MB and more to 2 MiB, smaller ones side by side in pieces of 20 MiB."""

CPU_WORKSPACE_BYTES = GIB
"""The same for one process on a CPU, without activations: Python with torch is 0.55 GiB resident, the API and template processes beside it
0.1 (measured with the shipped model), the rest is the allocator's."""

STEP_TOKENS = 8192
"""Most tokens of one step (the engine's `max_prefill_token_num`)."""

GRAPH_TOKENS = 2048
"""Most tokens of a step that runs as a CUDA graph."""
GRAPH_POOL_SLACK = 1.2
"""The graphs' pool over the activations of the largest graph: classes of different sizes cut it differently."""
MAX_GRAPHS = 256
"""CUDA graphs of one engine: more than any load has been seen to need."""
GRAPH_LAYER_BYTES = 40 << 10
"""What the driver keeps for each layer of one graph: 1.05 to 1.25 MB were seen with 32 layers."""

EDIT_BYTES = 3 * 4 * 6144
"""What one request may keep on the device of what it changes in logits: the server takes 4096 biases, 1024 stop tokens, and 256 bad words,
each spelled in two ways."""

USABLE_SHARE = 0.90
"""Share of a GPU's labelled memory that is promised; ECC, the driver and fragmentation take 3 to 8 %."""

TYPICAL_SESSION_LEN = 8192
TYPICAL_CONCURRENCY = 8
"""Without other wishes, a shape must hold the cache of eight sessions of 8192 tokens (or of the model's limit, where that is less)."""

MIN_SESSION_LEN = 256
"""A cache that cannot hold one session of this length serves nobody."""

_AWQ_PACK = 8  # 4-bit values in one int32; a shard's columns must be whole words
_CUDA_CONTEXT_BYTES = int(0.74 * GIB)  # 0.739 GiB measured on an H100, driver 580, with the kernels of one model loaded
_NCCL_BYTES = int(0.4 * GIB)
_CUBLAS_BYTES = 64 << 20  # a workspace of 32 MiB for each of two streams
_KERNEL_SCRATCH_BYTES = 10 << 20  # the linear kernels' sums of shared tiles, for a stream and for graphs: 9.8 MB on an H100
_LOGITS_COPIES = 4  # logits in float32, their softmax, and what filters and penalties keep; a draw's scratch, 19 MB, comes beside two
_SCORE_ROWS = 256  # rows of a prompt whose logits exist at once, where their log-probabilities are wanted
_PENALTY_BYTES = 3  # a count and a mark for each token of the vocabulary
_ATTENTION_PART = 2048  # tokens of a context that one program takes, where there are many sequences; each part leaves a partial result
_MAX_ATTENTION_PARTS = 128
_SHARED_PARTS = 512  # of all sequences together: the more of them, the fewer parts a prefix is cut into
_CHUNK_PARTS = 512  # of chunks of prompts, each of so many rows (half as many where heads are wider than 128)
_CHUNK_ROWS = 128
_LEAST_CUT = 1024  # tokens that chunks must see to be cut into parts
_BLOCK_SIZE = 64
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
    workspace_bytes: int,
    cache_share: float = 1.0,
) -> MemoryEstimate:
    """Memory of one of `tp` GPUs when `concurrency` sessions of `session_len` tokens are cached.

    `dtype_bytes` is the width that unquantized weights have once loaded, `kv_bytes` that of a cached element, `gpu_memory_bytes` the
    memory of one GPU (labelled, or measured) of which `usable_share` counts; `workspace_bytes` as that function gives them. Of what weights
    and workspace leave of it, the cache takes at most `cache_share` (the engine's `cache_max_entry_count`).
    """
    weights = math.ceil(weight_bytes(facts, tp, dtype_bytes) * (1 + WEIGHT_OVERHEAD))
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


def weight_bytes(facts: ModelFacts, tp: int, dtype_bytes: int) -> int:
    """Bytes of one rank's weights: an even part of all, and the rest of what every rank keeps whole (norms, key/value heads that cannot
    be divided any further)."""
    loaded = loaded_weight_bytes(facts, dtype_bytes)
    norms = (2 * facts.num_layers + 1) * facts.hidden_size * dtype_bytes
    replicas = max(0, tp - facts.num_kv_heads)
    keys = 2 * facts.num_layers * facts.hidden_size * facts.head_dim
    each = keys * dtype_bytes if facts.quantization is None else _packed_bytes(keys, facts.quantization.bits, facts.quantization.group_size)
    return math.ceil((loaded + (tp - 1) * norms + replicas * each) / tp)


def workspace_bytes(
    facts: ModelFacts, *, tp: int, dtype_bytes: int, max_batch_size: int, device: str, session_len: int | None = None
) -> int:
    """Bytes that one rank holds beside weights and cache; `device` is `cuda` or `cpu`. `session_len` None: the model's limit."""
    reserved = reserved_bytes(facts, tp=tp, dtype_bytes=dtype_bytes, max_batch_size=max_batch_size, device=device, session_len=session_len)
    return context_bytes(tp, device) + reserved


def context_bytes(tp: int, device: str) -> int:
    """What a process takes before it holds a tensor: on a GPU CUDA's context and libraries, and NCCL's buffers where ranks exchange."""
    if device == "cpu":
        return CPU_WORKSPACE_BYTES
    return _CUDA_CONTEXT_BYTES + (_NCCL_BYTES if tp > 1 else 0)


def reserved_bytes(
    facts: ModelFacts,
    *,
    tp: int,
    dtype_bytes: int,
    max_batch_size: int,
    device: str,
    session_len: int | None = None,
    step_tokens: int = STEP_TOKENS,
    graphs: bool = True,
) -> int:
    """What the engine keeps free, or takes, beside weights and cache, before the cache is sized."""
    session = session_len or facts.max_position_embeddings
    logits = max(max_batch_size, _SCORE_ROWS) * facts.vocab_size * 4
    sampling = (_LOGITS_COPIES - 1) * logits + max_batch_size * (facts.vocab_size * _PENALTY_BYTES + EDIT_BYTES)
    if device == "cpu":
        activations = step_tokens * _cpu_width(facts, tp) * dtype_bytes
        return activations + _LOGITS_COPIES * logits + 2 * _unpacked_bytes(facts, tp, dtype_bytes)
    parts = _attention_part_bytes(facts, tp, max_batch_size, session)
    total = max(_activation_bytes(facts, tp, dtype_bytes, step_tokens, parts), logits) + sampling
    if graphs:
        largest = _activation_bytes(facts, tp, dtype_bytes, min(step_tokens, GRAPH_TOKENS), parts)
        total += int(GRAPH_POOL_SLACK * largest) + MAX_GRAPHS * facts.num_layers * GRAPH_LAYER_BYTES
    return total + _table_bytes(facts, max_batch_size, session) + _CUBLAS_BYTES + _KERNEL_SCRATCH_BYTES


def _activation_bytes(facts: ModelFacts, tp: int, dtype_bytes: int, num_tokens: int, part_bytes: int) -> int:
    """The larger of what a layer's halves hold at once, beside the last layer's output, the residual stream and the normed input: queries,
    keys and values, rotated queries, the result and its parts; or gate and up with their product, and a matrix unpacked for them."""
    hidden = 3 * facts.hidden_size
    queries = facts.num_heads // tp * facts.head_dim
    keys = max(1, facts.num_kv_heads // tp) * facts.head_dim
    attention = num_tokens * (hidden + 3 * queries + 2 * keys) * dtype_bytes + part_bytes
    feed_forward = num_tokens * (hidden + 3 * facts.intermediate_size // tp) * dtype_bytes
    return max(attention, feed_forward + _unpacked_bytes(facts, tp, dtype_bytes))


def _cpu_width(facts: ModelFacts, tp: int) -> int:
    """Elements a token: two of the feed-forward's inner width and their product, four of the residual's, queries, keys and values twice."""
    heads = (facts.num_heads + 2 * facts.num_kv_heads) * facts.head_dim
    return (3 * facts.intermediate_size + 2 * heads) // tp + 4 * facts.hidden_size


def _attention_part_bytes(facts: ModelFacts, tp: int, max_batch_size: int, session_len: int) -> int:
    """Partial results, float32: of contexts that are split among several programs and of prefixes that are shared; then, where those were,
    of chunks of prompts that are split."""
    window = facts.sliding_window or session_len
    seen = min(session_len, window)
    parts = min(_MAX_ATTENTION_PARTS, math.ceil(seen / _ATTENTION_PART))
    decodes = (max_batch_size * parts if parts > 1 else 0) + (_SHARED_PARTS if max_batch_size > 1 else 0)
    rows = _CHUNK_ROWS if facts.head_dim <= 128 else _CHUNK_ROWS // 2
    chunks = _CHUNK_PARTS * rows if min(session_len, window + rows) > _LEAST_CUT else 0
    return max(decodes * facts.num_heads // tp, chunks) * (facts.head_dim + 1) * 4


def _unpacked_bytes(facts: ModelFacts, tp: int, dtype_bytes: int) -> int:
    """Gate and up, unpacked: what multiplying many rows with packed weights takes where no kernel does it directly (on a CPU twice)."""
    return 2 * facts.hidden_size * facts.intermediate_size // tp * dtype_bytes if facts.quantization is not None else 0


def _table_bytes(facts: ModelFacts, max_batch_size: int, session_len: int) -> int:
    """Angles of positions, float32; block tables, the step's rows of them, and their changes (three words each)."""
    return session_len * facts.head_dim * 4 + max_batch_size * math.ceil(session_len / _BLOCK_SIZE) * (1 + 1 + 3) * 4


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


def _most_parameters(facts: ModelFacts) -> int:
    """Weights of a model of our families, with a bias wherever some family has one."""
    queries, keys = facts.num_heads * facts.head_dim, facts.num_kv_heads * facts.head_dim
    biases = queries + 2 * keys + 2 * facts.intermediate_size + 2 * facts.hidden_size
    norms = 2 * facts.hidden_size + 2 * facts.head_dim
    matrices = facts.vocab_size * facts.hidden_size * (1 if facts.tie_word_embeddings else 2)
    return linear_parameters(facts) + matrices + facts.num_layers * (biases + norms) + facts.hidden_size


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
    """Bytes of the weights once loaded: unquantized tensors take `dtype_bytes` an element, packed ones stay as they are. What files hold
    beyond what the model has (a head though it is tied, elements wider than config.json says) is not loaded."""
    if facts.quantization is None:
        stored = facts.weight_bytes // facts.dtype_bytes
        return (stored if facts.family == "transformers" else min(stored, _most_parameters(facts))) * dtype_bytes
    packed = _packed_bytes(linear_parameters(facts), facts.quantization.bits, facts.quantization.group_size)
    rest = max(0, facts.weight_bytes - packed)
    return facts.weight_bytes - rest + rest // facts.dtype_bytes * dtype_bytes


def load_seconds(facts: ModelFacts, *, tp: int, device: str) -> float:
    """Seconds from the container's start to ready on a slow volume, for probes and deadlines; `device` is `cuda` or `cpu`.

    Ranks of one pod read the same files from the same volume, so more of them do not make it faster, but each starts a process.
    """
    return _LOAD_FIXED_S[device] + 5.0 * (tp - 1) + facts.weight_bytes / _LOAD_BYTES_PER_S
