"""Fixed, seeded request sets, the same for every engine that is measured. A test holds their digests."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import dataclass

__all__ = ["LLAMA_31_8B", "NAMES", "Workload", "build", "digest"]

_SEED = 20261120

LLAMA_31_8B: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128009, "torch_dtype": "bfloat16", "initializer_range": 0.02,
    "use_cache": True,
}  # fmt: skip
"""config.json of the shape that the figures are measured on."""


@dataclass(frozen=True)
class Workload:
    """`requests`: (prompt token ids, tokens to generate) in order of arrival, all there at once; `concurrency`: most that run at a time."""

    name: str
    requests: list[tuple[list[int], int]]
    concurrency: int


def _lognormal(rng: random.Random, mean: float, sigma: float, low: int, high: int) -> int:
    mu = math.log(mean) - sigma * sigma / 2
    return max(low, min(high, int(rng.lognormvariate(mu, sigma))))


def _ids(rng: random.Random, count: int, vocabulary: int = 120_000) -> list[int]:
    return [rng.randrange(1000, vocabulary) for _ in range(count)]


def _chat(r: random.Random) -> Workload:
    return Workload("chat", [(_ids(r, _lognormal(r, 220, 0.8, 16, 1024)), _lognormal(r, 280, 0.7, 16, 1024)) for _ in range(1024)], 256)


def _decode(r: random.Random) -> Workload:
    return Workload("decode", [(_ids(r, 128), 1024) for _ in range(256)], 256)


def _prefill(r: random.Random) -> Workload:
    return Workload("prefill", [(_ids(r, 4096), 16) for _ in range(96)], 256)


def _prefix(r: random.Random) -> Workload:
    shared = _ids(r, 2048)
    return Workload("prefix", [(shared + _ids(r, 128), 128) for _ in range(512)], 256)


def _batch16(r: random.Random) -> Workload:
    return Workload("batch16", [(_ids(r, 512), 512) for _ in range(16)], 16)


def _single(r: random.Random) -> Workload:
    return Workload("single", [(_ids(r, 1024), 256)], 1)


_BUILDERS = [_chat, _decode, _prefill, _prefix, _batch16, _single]
NAMES = tuple(builder.__name__[1:] for builder in _BUILDERS)


def build(name: str) -> Workload:
    """The request set `name`. Raises KeyError for an unknown name."""
    if name not in NAMES:
        raise KeyError(f"unknown workload {name!r}; known: {', '.join(NAMES)}")
    index = NAMES.index(name)
    return _BUILDERS[index](random.Random(_SEED + index))


def digest(workload: Workload) -> str:
    """First 16 hex digits of the SHA-256 of the requests as compact JSON."""
    return hashlib.sha256(json.dumps(workload.requests, separators=(",", ":")).encode()).hexdigest()[:16]
