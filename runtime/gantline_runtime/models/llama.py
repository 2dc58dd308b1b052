"""Llama 1 to 3.2 (`LlamaForCausalLM`): full attention in every layer."""

from __future__ import annotations

from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.models.decoder import DecoderConfig

__all__ = ["decoder_config"]


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    return DecoderConfig.make(checkpoint, windows=(0,) * checkpoint.shape.num_layers)
