"""Mistral (`MistralForCausalLM`): Llama with a sliding window in every layer, unless the checkpoint has none."""

from __future__ import annotations

from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.models.decoder import DecoderConfig

__all__ = ["decoder_config"]


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    shape = checkpoint.shape
    return DecoderConfig.make(checkpoint, windows=(shape.sliding_window or 0,) * shape.num_layers)
