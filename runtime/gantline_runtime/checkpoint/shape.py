"""What config.json says about a model: its family, dimensions and quantization, each checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gantline_runtime.checkpoint.files import quote
from gantline_runtime.errors import CheckpointError
from gantline_runtime.termination import Reason
from gantline_runtime.torch_import import complete_torch

__all__ = ["AWQ_GROUP_SIZES", "FAMILIES", "HEAD_DIMS", "ROPE_TYPES", "AwqFormat", "ModelShape", "longest_session", "parse_shape"]

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
AWQ_GROUP_SIZES = (32, 64, 128)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)
"""Those of the kernels, which are not imported here: who judges a model need not have torch."""
_MODEL_TYPES = {family: architecture for architecture, family in FAMILIES.items()}
_MAX_CONTEXT = 1 << 28
_DTYPES = ("float32", "bfloat16", "float16")
_CONFIG_CURE = "Correct config.json, or download the checkpoint again."
_QUANTIZATION_CURE = (
    "Give an unquantized checkpoint (Gantline can quantize it), or one in AWQ's gemm layout: "
    f"bits 4, group_size {', '.join(map(str, AWQ_GROUP_SIZES))}, zero_point true, version gemm."
)


@dataclass(frozen=True)
class AwqFormat:
    """4-bit weights in AWQ's public `gemm` layout, with zero points, in groups of `group_size` input channels."""

    group_size: int
    bits: int = 4
    modules_to_not_convert: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder, as config.json gives them (transformers' defaults filled in).

    `family` "transformers": an architecture that transformers' own implementation runs; what its matrices look like is the business of that
    code, so biases, norms and quantization below say no.
    """

    architecture: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    """What config.json says; `longest_session` has what that means."""
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str | None
    """The type config.json names, or None where it names none."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    awq: AwqFormat | None
    fallback_reason: str = ""
    """Why transformers' own implementation runs it, where it does."""


def parse_shape(config: Mapping[str, Any]) -> ModelShape:
    """The model that `config` (config.json, decoded) describes.

    Raises CheckpointError: NotAModel, UnsupportedArchitecture, InvalidCheckpoint (a field missing or out of range), InvalidQuantization.
    """
    architecture = _parse_architecture(config)
    reason = _why_not_ours(config, architecture)
    if reason:
        return replace(_describe_by_transformers(config, architecture), fallback_reason=reason)
    family = FAMILIES[architecture]
    heads = _count(config, "num_attention_heads", 1 << 14)
    hidden = _count(config, "hidden_size", 1 << 20)
    kv_heads = _count(config, "num_key_value_heads", heads, default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv_heads})", cure=_CONFIG_CURE
        )
    return ModelShape(
        architecture=architecture,
        family=family,
        num_layers=_count(config, "num_hidden_layers", 1 << 12),
        hidden_size=hidden,
        intermediate_size=_count(config, "intermediate_size", 1 << 22),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_parse_head_dim(config, family, hidden, heads),
        vocab_size=_count(config, "vocab_size", 1 << 24),
        max_position_embeddings=_count(config, "max_position_embeddings", _MAX_CONTEXT),
        sliding_window=_parse_sliding_window(config, family),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        dtype=_parse_dtype(config),
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and _flag(config, "attention_bias")),
        o_bias=family in ("llama", "qwen3") and _flag(config, "attention_bias"),
        mlp_bias=family == "llama" and _flag(config, "mlp_bias"),
        qk_norm=family == "qwen3",
        awq=_parse_quantization(config.get("quantization_config")),
    )


def _describe_by_transformers(config: Mapping[str, Any], architecture: str) -> ModelShape:
    try:
        complete_torch()  # transformers imports its compiler, which cannot be imported without the rest
        from gantline_runtime.models import transformers_trace  # seconds of torch and transformers, which most models need not wait for
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"the architecture {quote(architecture)} can only be judged with {error.name}, which is not installed",
            reason=Reason.UNSUPPORTED_ARCHITECTURE,
            cure="Install gantline[runtime].",
        ) from None
    return transformers_trace.describe(config)


def _parse_architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if names is None and isinstance(config.get("model_type"), str):
        names = [_MODEL_TYPES.get(config["model_type"], config["model_type"])]
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            "config.json names neither architectures nor model_type",
            reason=Reason.NOT_A_MODEL,
            cure="Give the folder of a language model as Hugging Face transformers saves it.",
        )
    return names[0]


def _count(config: Mapping[str, Any], key: str, most: int, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise CheckpointError(f"config.json lacks {key}", cure=_CONFIG_CURE)
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f"config.json: {key} is {quote(value)}; expected an integer from 1 to {most}", cure=_CONFIG_CURE)
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {quote(value)}; expected true or false", cure=_CONFIG_CURE)
    return bool(value)


def _why_not_ours(config: Mapping[str, Any], architecture: str) -> str:
    """What the model has that no implementation of ours has, among architecture, activation and rotary embedding; empty where nothing is
    missing. Their numbers are the engine's matter."""
    if architecture not in FAMILIES:
        return f"Gantline has no implementation of {architecture[:100]}"
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(section, Mapping):
        raise CheckpointError("config.json: rope_parameters is no object", cure=_CONFIG_CURE)
    kind = section.get("rope_type", section.get("type", "default"))
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        return f"Gantline's implementation of {architecture} has the activation silu, not {quote(activation)}"
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        return f"Gantline's implementation of {architecture} has no rotary embedding of the type {quote(kind)}"
    return ""


def longest_session(config: Mapping[str, Any], shape: ModelShape) -> int:
    """Tokens, prompt and output. YaRN (https://arxiv.org/abs/2309.00071) stretches the context of the training by its factor, also where
    max_position_embeddings was left as it is, as the publishers of Qwen advise."""
    section = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(section, Mapping) or section.get("rope_type", section.get("type")) != "yarn":
        return shape.max_position_embeddings
    original: Any = section.get("original_max_position_embeddings") or shape.max_position_embeddings
    factor: Any = section.get("factor")
    if not _is_length(original) or not _is_length(factor):
        return shape.max_position_embeddings
    return max(shape.max_position_embeddings, min(int(original * factor), _MAX_CONTEXT))


def _is_length(value: Any) -> bool:
    return isinstance(value, (int, float)) and 1 <= value <= _MAX_CONTEXT


def _parse_head_dim(config: Mapping[str, Any], family: str, hidden: int, heads: int) -> int:
    if config.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size ({hidden}) is no multiple of num_attention_heads ({heads})", cure=_CONFIG_CURE)
    head_dim = _count(config, "head_dim", 1 << 12, default=128 if family == "qwen3" else hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}; rotary embeddings need an even one", cure=_CONFIG_CURE)
    if head_dim not in HEAD_DIMS:
        raise CheckpointError(
            f"attention with heads of dimension {head_dim} is not implemented",
            reason=Reason.UNSUPPORTED_ARCHITECTURE,
            cure=f"Use a model whose heads have a dimension of {', '.join(map(str, HEAD_DIMS))}.",
        )
    return head_dim


def _parse_sliding_window(config: Mapping[str, Any], family: str) -> int | None:
    """Tokens each one may look back, or None: Mistral has a window unless it is null, Qwen only with use_sliding_window, Llama never."""
    if family == "llama" or (family in ("qwen2", "qwen3") and not _flag(config, "use_sliding_window")):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return _count(config, "sliding_window", 1 << 28, default=4096)


def _parse_dtype(config: Mapping[str, Any]) -> str | None:
    value = config.get("dtype", config.get("torch_dtype"))
    if value is None:
        return None
    if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
        raise CheckpointError(f"config.json: dtype is {quote(value)}; expected {', '.join(_DTYPES)}", cure=_CONFIG_CURE)
    return value.removeprefix("torch.")


def _parse_quantization(section: Any) -> AwqFormat | None:
    if section is None:
        return None
    if not isinstance(section, dict):
        raise _bad_quantization("quantization_config is not an object")
    method = section.get("quant_method")
    if method != "awq":
        raise _bad_quantization(f"the quantization method {quote(method)} is not served")
    expected = {"bits": (4,), "group_size": AWQ_GROUP_SIZES, "zero_point": (True,), "version": ("gemm", "GEMM")}
    for key, allowed in expected.items():
        value = section.get(key, "gemm" if key == "version" else None)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise _bad_quantization(f"quantization_config.{key} is {quote(value)}")
    skipped = section.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or len(skipped) > 10_000 or not all(isinstance(name, str) and name for name in skipped):
        raise _bad_quantization("quantization_config.modules_to_not_convert is not a list of names")
    return AwqFormat(group_size=section["group_size"], modules_to_not_convert=tuple(skipped))


def _bad_quantization(message: str) -> CheckpointError:
    return CheckpointError(f"config.json: {message}", reason=Reason.INVALID_QUANTIZATION, cure=_QUANTIZATION_CURE)
