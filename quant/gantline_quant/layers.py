"""One decoder layer at a time: transformers' modules, built without weights and filled from the checkpoint when needed.

Arithmetic is float32 on any device, so that the search compares quantization errors and not rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gantline_runtime.checkpoint import Checkpoint, LocalFiles
from gantline_runtime.errors import QuantizationError
from torch import Tensor, nn

__all__ = ["LayerStream", "read_tensor"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor as stored. Raises QuantizationError where it holds NaN or infinity."""
    info = checkpoint.tensors[name]
    if math.prod(info.shape) == 0:
        return torch.empty(info.shape, dtype=_DTYPES[info.dtype])
    data = bytearray(checkpoint.source.read(info.file, info.start, info.nbytes))
    tensor = torch.frombuffer(data, dtype=_DTYPES[info.dtype]).view(info.shape)
    if not torch.isfinite(tensor).all():
        raise QuantizationError(
            f"the tensor {name!r} in {info.file!r} holds NaN or infinity", cure="Ask the publisher for a sound checkpoint."
        )
    return tensor


class LayerStream:
    """The decoder of `checkpoint`, of which no more than a layer is in memory at once."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        assert isinstance(checkpoint.source, LocalFiles)
        self.checkpoint, self.device = checkpoint, device
        config = AutoConfig.from_pretrained(checkpoint.source.root, local_files_only=True, trust_remote_code=False)
        config.quantization_config = None
        with torch.device("meta"):
            self._skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        self._rotary = type(self._skeleton.model.rotary_emb)(config=config).to(device)
        self._windows = _sliding_windows(config)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """float32 [windows, tokens, hidden] on the CPU."""
        return torch.nn.functional.embedding(ids, table).float()

    def load(self, index: int) -> nn.Module:
        """Decoder layer `index` with the checkpoint's weights in float32, on the device."""
        layer = copy.deepcopy(self._skeleton.model.layers[index])
        names = [name for name, _ in layer.named_parameters()]
        weights = {name: read_tensor(self.checkpoint, f"model.layers.{index}.{name}").to(self.device, torch.float32) for name in names}
        layer.load_state_dict(weights, assign=True)
        return layer.requires_grad_(False)

    def context(self, index: int, length: int) -> dict[str, Any]:
        """What layer `index`'s attention needs beside its input: rotary cosines and sines, and a mask where it has a sliding window."""
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        rotary = self._rotary(torch.empty(1, device=self.device), positions)
        window = self._windows[index]
        mask = None
        if window is not None and window < length:
            distance = positions.T - positions
            mask = ((distance >= 0) & (distance < window))[None, None]
        return {"position_embeddings": rotary, "attention_mask": mask}

    def run(self, layer: nn.Module, index: int, hidden: Tensor, *, windows_at_once: int = 4) -> Iterator[Tensor]:
        """Outputs of `layer` for [windows, tokens, hidden] on the CPU, in chunks of a few windows, on the CPU again."""
        context = self.context(index, hidden.shape[1])
        for chunk in hidden.split(windows_at_once):
            yield layer(chunk.to(self.device), **context).cpu()

    def log_likelihoods(self, hidden: Tensor, ids: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Natural log-likelihood of each next token, float32 [windows, tokens - 1]; head and norm rounded to `dtype` first."""
        tied = self.checkpoint.shape.tie_word_embeddings
        head, norm = (
            self._rounded(name, dtype) for name in ("model.embed_tokens.weight" if tied else "lm_head.weight", "model.norm.weight")
        )
        final: Callable[[Tensor], Tensor] = copy.deepcopy(self._skeleton.model.norm)
        final.load_state_dict({"weight": norm}, assign=True)  # type: ignore[attr-defined]
        results = []
        for states, targets in zip(hidden, ids, strict=True):
            logits = final(states[:-1].to(self.device)) @ head.T
            results.append(-torch.nn.functional.cross_entropy(logits, targets[1:].to(self.device), reduction="none").cpu())
        return torch.stack(results)

    def _rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        return read_tensor(self.checkpoint, name).to(dtype).to(self.device, torch.float32)


def _sliding_windows(config: Any) -> list[int | None]:
    """Of each layer: how many tokens it may look back, or None for all."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
