"""Model families over one decoder: each says in its own file how its config.json differs, `build_model` picks by architecture.

What has no family runs by transformers' own implementation over our cache (`transformers_decoder.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.layers.attention import AttentionContext, LayerCache
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.loader import Loading, Progress
from gantline_runtime.models import llama, mistral, qwen2, qwen3
from gantline_runtime.models.decoder import Decoder, DecoderConfig
from gantline_runtime.parallel import Parallel

__all__ = ["Decoder", "DecoderConfig", "Model", "build_model", "decoder_config"]

_FAMILIES = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def decoder_config(checkpoint: Checkpoint) -> DecoderConfig:
    """What the decoder needs to know, from the checkpoint's family. Raises CheckpointError."""
    return _FAMILIES[checkpoint.shape.family].decoder_config(checkpoint)


class Model(Protocol):
    """What runs a step between token numbers and logits."""

    kv_heads: int
    """Key/value heads of this rank, in every layer."""
    capturable: bool
    """Whether steps may run as CUDA graphs."""

    def start_loading(self, checkpoint: Checkpoint, on_progress: Callable[[Progress], None] | None = None) -> Loading:
        """Have this rank's part of the weights read; steps may run meanwhile. `on_progress` hears of bytes, here or in `wait`."""
        ...

    def forward(
        self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext, rows: torch.Tensor | None
    ) -> torch.Tensor: ...

    def forward_briefly(
        self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """Takes as much memory as `forward`, and gives as much, at a small part of its time if that can be; the values mean nothing."""
        ...

    def load_kernels(self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext) -> None:
        """Launch the kernels that `forward` would for all rows, at a small part of its time if that can be: so they are loaded."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None: ...


def build_model(checkpoint: Checkpoint, *, session_len: int, parallel: Parallel, build: BuildContext) -> Model:
    """The model of this rank without its weights; `start_loading` has them read."""
    if checkpoint.shape.family == "transformers":
        from gantline_runtime.models.transformers_decoder import TransformersDecoder  # transformers takes seconds to import

        return TransformersDecoder(checkpoint, session_len, build)
    return Decoder(decoder_config(checkpoint), session_len=session_len, parallel=parallel, build=build)
