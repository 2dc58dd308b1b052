"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): biases on query, key and value; a sliding window in the upper layers, where switched on."""

from __future__ import annotations

from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.errors import CheckpointError
from gantline_runtime.models.decoder import DecoderConfig

__all__ = ["decoder_config", "layer_windows"]

_KINDS = ("full_attention", "sliding_attention")
_DEFAULT_MAX_WINDOW_LAYERS = 28


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    return DecoderConfig.make(checkpoint, windows=layer_windows(checkpoint))


def layer_windows(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Each layer's window: as `layer_types` says, else from layer `max_window_layers` on."""
    shape, config = checkpoint.shape, checkpoint.config
    if shape.sliding_window is None:
        return (0,) * shape.num_layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        if not isinstance(first, int):
            raise _bad("max_window_layers is no integer")
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(shape.num_layers)]
    if not isinstance(kinds, list) or len(kinds) != shape.num_layers or not all(kind in _KINDS for kind in kinds):
        raise _bad(f"layer_types must name {' or '.join(_KINDS)} for each of {shape.num_layers} layers")
    return tuple(shape.sliding_window if kind == "sliding_attention" else 0 for kind in kinds)


def _bad(message: str) -> CheckpointError:
    return CheckpointError(f"config.json: {message}", cure="Correct config.json, or download the checkpoint again.")
