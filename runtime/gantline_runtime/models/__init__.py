"""Model families over one decoder: each says in its own file how its config.json differs, `build_model` picks by architecture."""

from __future__ import annotations

from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.models import llama, mistral, qwen2, qwen3
from gantline_runtime.models.decoder import Decoder, DecoderConfig
from gantline_runtime.parallel import Parallel

__all__ = ["Decoder", "DecoderConfig", "build_model", "decoder_config"]

_FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    """What the decoder needs to know, from the checkpoint's family. Raises CheckpointError."""
    return _FAMILIES[checkpoint.shape.family].decoder_config(checkpoint)


def build_model(checkpoint: Checkpoint, *, session_len: int, parallel: Parallel, build: BuildContext) -> Decoder:
    """The model with uninitialised weights of this rank; `loader.load_weights` fills them."""
    return Decoder(decoder_config(checkpoint), session_len=session_len, parallel=parallel, build=build)
