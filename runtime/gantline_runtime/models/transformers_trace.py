"""What transformers' own implementation of a model asks of attention, found by running it once without weights.

A model that has no implementation of ours runs by transformers' (`transformers_decoder.py`), with our paged cache in the place of its
attention. Whether that is possible, and how large the cache's rows are, is not written in config.json in any common form. So the model is
built on torch's meta device, where tensors have shapes but no data, and two tokens are sent through it: each attention layer then says its
heads, scale and window by the call that it makes.

LongRoPE (https://arxiv.org/abs/2402.13753: Phi-3 and Phi-4 of 128k) has two sets of frequencies, and transformers takes the one or the
other by the longest sequence of the call: what others send would change a sequence's keys. Here the session length decides, once.

What cannot be served is refused by name: encoders and decoders with an encoder, recurrent layers, latent attention (keys and values of
different widths), attention sinks and biases, chunked attention, layers that differ in their heads, dynamic rotary embeddings, code that
comes with the checkpoint.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from gantline_kernels import api
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gantline_runtime.checkpoint.files import quote
from gantline_runtime.checkpoint.shape import ModelShape
from gantline_runtime.errors import CheckpointError
from gantline_runtime.termination import Reason

__all__ = ["AttentionLayer", "architecture_of", "describe", "fix_rotary", "quiet", "read_config", "trace"]

_TRACING = "gantline_trace"
_MAX_LAYERS = 512
_MAX_SIZE = 1 << 24
_HARMLESS = frozenset({
    "cache_position", "dropout", "is_causal", "logits_to_keep", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "use_cache",
})  # fmt: skip
"""What models pass to every attention, and what paged attention has no use for."""
_REFUSED_SETTINGS = {
    "kv_lora_rank": "latent attention (kv_lora_rank)",
    "attention_chunk_size": "attention in chunks (attention_chunk_size)",
    "vision_config": "images as input (vision_config)",
    "audio_config": "sound as input (audio_config)",
}
_CURE = "Serve a decoder-only model of text with standard attention."


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of the model: its module's name, and what it asks for."""

    module: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int
    """Tokens that each one sees, itself among them; 0: all."""
    logit_softcap: float
    """0: none."""


def describe(config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that `config` (config.json, decoded) names, as the engine needs it.

    Raises CheckpointError: UnsupportedArchitecture with what stands in the way; InvalidQuantization; InvalidCheckpoint if transformers can
    make no sense of the file.
    """
    architecture = architecture_of(config)
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"quantized checkpoints of {quote(architecture)} are not served: transformers' own implementation runs it",
            reason=Reason.INVALID_QUANTIZATION,
            cure="Give an unquantized checkpoint.",
        )
    parsed = read_config(config)
    layers = trace(parsed)
    first = layers[0]
    windows = {layer.sliding_window for layer in layers}
    dtype = config.get("dtype", config.get("torch_dtype"))
    return ModelShape(
        architecture=architecture,
        family="transformers",
        num_layers=len(layers),
        hidden_size=_size(parsed, "hidden_size"),
        intermediate_size=_size(parsed, "intermediate_size", default=4 * _size(parsed, "hidden_size")),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        vocab_size=_size(parsed, "vocab_size"),
        max_position_embeddings=_size(parsed, "max_position_embeddings", most=1 << 28),
        sliding_window=windows.pop() or None if len(windows) == 1 else None,
        tie_word_embeddings=bool(getattr(parsed, "tie_word_embeddings", False)),
        dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) and dtype.removeprefix("torch.") in _DTYPES else None,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        awq=None,
    )


_DTYPES = ("float32", "bfloat16", "float16")


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that `config` names, or that transformers has for its model_type."""
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    model_type = str(config.get("model_type"))
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, model_type)


def read_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of a decoder-only language model that is served this way. Raises CheckpointError as `describe` does."""
    name, model_type = architecture_of(config), config.get("model_type")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not config.get("auto_map"):
        raise _unsupported(name, "transformers knows no decoder-only language model of this name")
    if not isinstance(model_type, str):
        raise _invalid(f"model_type is {quote(model_type)}; expected a text")
    if model_type not in CONFIG_MAPPING:
        foreign = "it needs code that comes with the checkpoint, which is never run"
        reason = foreign if config.get("auto_map") else f"transformers knows no model_type {quote(model_type)}"
        raise _unsupported(name, reason)
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name != expected:
        raise _invalid(f"model_type {quote(model_type)} is transformers' {expected}, but architectures name {quote(name)}")
    _check_settings(name, config)
    try:
        with quiet():
            return CONFIG_MAPPING[model_type].from_dict({key: value for key, value in config.items() if key != "auto_map"})
    except Exception as error:  # a hub's file may hold anything, and transformers' classes fail in their own ways
        raise _invalid(f"transformers cannot read it: {type(error).__name__}: {str(error)[:200]}") from None


def _check_settings(name: str, config: Mapping[str, Any]) -> None:
    if config.get("is_encoder_decoder"):
        raise _unsupported(name, "it has an encoder")
    for key, what in _REFUSED_SETTINGS.items():
        if config.get(key) is not None:
            raise _unsupported(name, f"it has {what}")
    depth = config.get("num_hidden_layers", config.get("n_layer", 1))
    if type(depth) is not int or not 1 <= depth <= _MAX_LAYERS:
        raise _invalid(f"num_hidden_layers is {quote(depth)}; expected an integer from 1 to {_MAX_LAYERS}")


def trace(config: Any) -> list[AttentionLayer]:
    """Every attention layer, in the order of their calls; `config` stays as it is. Raises CheckpointError as `describe` does."""
    config = copy.deepcopy(config)  # transformers writes its choices into it
    config.pad_token_id = None  # or prompts are searched for it, to warn of missing masks
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name: str = kind.__name__
    if kind._is_stateful:
        raise _unsupported(name, "it has recurrent layers")
    if not kind._supports_attention_backend:
        raise _unsupported(name, "its attention cannot be replaced: transformers offers no interface for it")
    _check_rotary(name, config)
    recorder = _Recorder(name)
    try:
        with quiet(), torch.device("meta"), torch.inference_mode():
            model = AutoModelForCausalLM.from_config(config, attn_implementation=_TRACING, experts_implementation=_TRACING).eval()
            fix_rotary(model, session_len=1)
            recorder.watch(model)
            ids = torch.zeros((1, 2), dtype=torch.int64)
            model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False, logits_to_keep=1)
    except CheckpointError:
        raise
    except KeyError as error:
        raise _unsupported(name, f"transformers knows no {quote(error.args[0])}, which config.json names") from None
    except Exception as error:
        raise _unsupported(name, f"it cannot be traced: {type(error).__name__}: {str(error)[:200]}") from None
    return recorder.checked()


def _check_rotary(name: str, config: Any) -> None:
    section = getattr(config, "rope_parameters", None) or {}
    for part in section.values() if all(isinstance(value, dict) for value in section.values()) else (section,):
        kind = part.get("rope_type", "default")
        if kind == "dynamic":
            raise _unsupported(name, "its rotary embedding changes with the longest of the sequences that run together (dynamic)")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise _unsupported(name, f"transformers knows no rotary embedding of the type {quote(kind)}")


def fix_rotary(model: torch.nn.Module, session_len: int) -> None:
    """Give LongRoPE the frequencies of sessions of up to `session_len` tokens, whatever a step holds."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, module.inv_freq.device, seq_len=session_len)
            module.inv_freq = frequencies
            module.rope_type = "default"


class _Recorder:
    """Hears every attention's call while a model is traced."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._names: dict[int, str] = {}
        self._layers: list[AttentionLayer] = []

    def watch(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            self._names[id(module)] = name
            module.gantline_recorder = self

    def record(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, asked: dict[str, Any]) -> None:
        _, heads, _, dim = query.shape
        if key.shape != value.shape or key.shape[3] != dim:
            raise _unsupported(self._name, f"its keys and values differ in width ({key.shape[3]} and {value.shape[3]}): latent attention")
        if getattr(module, "is_causal", True) is False or asked.get("is_causal") is False:
            raise _unsupported(self._name, "its attention looks at later tokens")
        if asked.pop("attention_mask") is not None:  # transformers makes no ordinary masks for an attention that it does not know
            raise _unsupported(self._name, "it masks tokens by rules of its own")
        strange = sorted(key for key, given in asked.items() if given is not None and key not in _HARMLESS | _KNOWN)
        if strange:
            raise _unsupported(self._name, f"its attention is given {', '.join(strange)}")
        window, scale, softcap = asked.get("sliding_window") or 0, asked.get("scaling"), asked.get("softcap") or 0.0
        layer = AttentionLayer(
            self._names[id(module)], heads, key.shape[1], dim, dim**-0.5 if scale is None else float(scale), int(window), float(softcap)
        )
        self._layers.append(layer)

    def checked(self) -> list[AttentionLayer]:
        layers = self._layers
        if not layers:
            raise _unsupported(self._name, "no attention of it was heard of")
        if len({layer.module for layer in layers}) < len(layers):
            raise _unsupported(self._name, "an attention layer is used more than once")
        kinds = {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in layers}
        if len(kinds) > 1:
            raise _unsupported(self._name, "its layers differ in heads or head dimension")
        heads, kv_heads, dim = kinds.pop()
        if dim not in api.HEAD_DIMS or heads % kv_heads:
            raise _unsupported(self._name, f"attention with {heads} and {kv_heads} heads of dimension {dim} is not implemented")
        return layers


_KNOWN = frozenset({"scaling", "sliding_window", "softcap"})


def _traced_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **asked: Any
) -> tuple[torch.Tensor, None]:
    """transformers' interface of attention: [1, heads, T, D] -> [1, T, heads, D]."""
    module.gantline_recorder.record(module, query, key, value, {**asked, "attention_mask": attention_mask})
    return query.transpose(1, 2), None


def _traced_experts(module: torch.nn.Module, hidden: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Which experts a token goes to depends on data, which the meta device has not; their result has the shape of what goes in."""
    del module
    return hidden


AttentionInterface.register(_TRACING, _traced_attention)
ALL_EXPERTS_FUNCTIONS.register(_TRACING, _traced_experts)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' advice on standard error and its progress bars: what matters is said by us."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _size(config: Any, key: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
    value = getattr(config, key, None)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise _invalid(f"{key} is {quote(value)}; expected an integer from 1 to {most}")
    return value


def _invalid(what: str) -> CheckpointError:
    return CheckpointError(f"config.json: {what}", cure="Correct config.json, or download the checkpoint again.")


def _unsupported(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"the architecture {quote(name)} cannot be served: {why}", reason=Reason.UNSUPPORTED_ARCHITECTURE, cure=_CURE)
