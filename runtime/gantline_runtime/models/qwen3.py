"""Qwen3 dense (`Qwen3ForCausalLM`): RMS norms on each head's query and key instead of biases; windows as in Qwen2."""

from __future__ import annotations

from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.models.decoder import DecoderConfig
from gantline_runtime.models.qwen2 import layer_windows

__all__ = ["decoder_config"]


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    return DecoderConfig.make(checkpoint, windows=layer_windows(checkpoint))
