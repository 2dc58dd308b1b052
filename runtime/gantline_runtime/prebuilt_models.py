"""The models whose Triton kernels an image carries: what decides about kernels, from each one's config.json.

Kernels are shared by all models of the same numbers, whatever their weights: a fine-tuned model is served by those of what it was made
from. Split over GPUs, a model's parts have other numbers of heads, so each degree of tensor parallelism is a variant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gantline_runtime.errors import ConfigurationError

__all__ = ["MODELS", "ModelVariant", "read_variants", "select_variants"]


@dataclass(frozen=True)
class ModelVariant:
    """A model's config.json (what of it matters), at a degree of tensor parallelism."""

    name: str
    config: dict[str, Any]
    tp: int


@dataclass(frozen=True)
class _Model:
    config: dict[str, Any]
    tp: tuple[int, ...]
    awq: bool = False
    """Whether the quantized copy is served from an image too, in the type that the quantizer writes."""


def _config(
    architecture: str, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, context: int = 32768, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "num_hidden_layers": 2,
        "dtype": "bfloat16",
        "sliding_window": None,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_AWQ_GROUP = 128
_AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": _AWQ_GROUP, "zero_point": True, "version": "gemm"}}

MODELS: dict[str, _Model] = {
    "llama-3.1-8b": _Model(_config("Llama", 4096, 14336, 32, 8, 128256, 131072), (1, 2, 4), awq=True),
    "llama-3.3-70b": _Model(_config("Llama", 8192, 28672, 64, 8, 128256, 131072), (1, 2, 4, 8), awq=True),
    "llama-3.2-1b": _Model(_config("Llama", 2048, 8192, 32, 8, 128256, 131072, head_dim=64, **_TIED), (1,)),
    "llama-3.2-3b": _Model(_config("Llama", 3072, 8192, 24, 8, 128256, 131072, head_dim=128, **_TIED), (1,)),
    "mistral-7b-v0.1": _Model(_config("Mistral", 4096, 14336, 32, 8, 32000, sliding_window=4096), (1,)),
    "mistral-7b-v0.3": _Model(_config("Mistral", 4096, 14336, 32, 8, 32768), (1, 2), awq=True),
    "mistral-nemo-12b": _Model(_config("Mistral", 5120, 14336, 32, 8, 131072, 131072, head_dim=128), (1, 2)),
    "mistral-small-24b": _Model(_config("Mistral", 5120, 32768, 32, 8, 131072, head_dim=128), (1, 2, 4)),
    "qwen2.5-0.5b": _Model(_config("Qwen2", 896, 4864, 14, 2, 151936, **_TIED), (1,)),
    "qwen2.5-1.5b": _Model(_config("Qwen2", 1536, 8960, 12, 2, 151936, **_TIED), (1,)),
    "qwen2.5-3b": _Model(_config("Qwen2", 2048, 11008, 16, 2, 151936, **_TIED), (1,)),
    "qwen2.5-7b": _Model(_config("Qwen2", 3584, 18944, 28, 4, 152064), (1, 2), awq=True),
    "qwen2.5-14b": _Model(_config("Qwen2", 5120, 13824, 40, 8, 152064), (1, 2), awq=True),
    "qwen2.5-32b": _Model(_config("Qwen2", 5120, 27648, 40, 8, 152064), (1, 2, 4), awq=True),
    "qwen2.5-72b": _Model(_config("Qwen2", 8192, 29568, 64, 8, 152064), (1, 2, 4, 8), awq=True),
    "qwen3-0.6b": _Model(_config("Qwen3", 1024, 3072, 16, 8, 151936, 40960, head_dim=128, **_TIED), (1,)),
    "qwen3-1.7b": _Model(_config("Qwen3", 2048, 6144, 16, 8, 151936, 40960, head_dim=128, **_TIED), (1,)),
    "qwen3-4b": _Model(_config("Qwen3", 2560, 9728, 32, 8, 151936, 40960, head_dim=128, **_TIED), (1,)),
    "qwen3-8b": _Model(_config("Qwen3", 4096, 12288, 32, 8, 151936, 40960, head_dim=128), (1, 2), awq=True),
    "qwen3-14b": _Model(_config("Qwen3", 5120, 17408, 40, 8, 151936, 40960, head_dim=128), (1, 2), awq=True),
    "qwen3-32b": _Model(_config("Qwen3", 5120, 25600, 64, 8, 151936, 40960, head_dim=128), (1, 2, 4), awq=True),
}
"""By name: the configuration, and the degrees of tensor parallelism that it is served with on GPUs of 24 to 141 GB."""


def select_variants(names: Sequence[str]) -> Iterator[ModelVariant]:
    """Of these models, or of all for none. Raises ConfigurationError for an unknown name."""
    for name in names or MODELS:
        if name not in MODELS:
            raise ConfigurationError(f"no model {name!r} is known", cure=f"Known models: {', '.join(MODELS)}; --config takes any other.")
        model = MODELS[name]
        quantized = {**model.config, "dtype": "float16", **_AWQ}
        for tp in model.tp:
            yield ModelVariant(name, model.config, tp)
            if model.awq and model.config["intermediate_size"] // tp % _AWQ_GROUP == 0:
                yield ModelVariant(f"{name}-awq", quantized, tp)


def read_variants(path: Path, degrees: Sequence[int]) -> Iterator[ModelVariant]:
    """Of the model whose config.json this is, or whose folder. Raises ConfigurationError where it cannot be read."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read as a model's configuration: {error}", cure="Give its config.json.") from None
    for tp in degrees:
        yield ModelVariant(file.parent.name, config, tp)
