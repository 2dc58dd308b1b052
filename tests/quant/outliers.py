"""The tiny model with planted outlier channels: the same function, but hard to round.

Large language models have a few activation channels that are tens of times larger than the others; the weights that read them matter most,
and round-to-nearest does not know. Here such channels are planted: a channel's activation is multiplied by `FACTOR` (in the norm, or in the
rows that make it) and the columns that read it are divided by it. `FACTOR` is a power of two, so in bfloat16 nothing else changes.

`SEED`, `FACTOR`, `NORM_CHANNELS` and `MLP_CHANNELS` were fixed before AWQ was first run on the result; of a few settings, this one costs
round-to-nearest the most (groups of 128, shipped held-out text: perplexity 54 becomes 114), far above the noise of the measurement.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SEED = 20260726
FACTOR = 32.0
NORM_CHANNELS = 32
"""Of each norm's 256 outputs, in every layer: what queries, keys and values read, and what gate and up read."""
MLP_CHANNELS = 96
"""Of the 768 inputs of each down projection."""


def plant_outliers(source: Path, target: Path) -> None:
    """Write a copy of the checkpoint in `source` (one safetensors file, Llama's names) with outlier channels."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(SEED)
    for layer in range(json.loads((source / "config.json").read_text())["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            channels = torch.randperm(weights[f"{prefix}{norm}.weight"].numel(), generator=generator)[:NORM_CHANNELS]
            weights[f"{prefix}{norm}.weight"][channels] *= FACTOR
            for reader in readers:
                weights[f"{prefix}{reader}.weight"][:, channels] /= FACTOR
        up, down = weights[f"{prefix}mlp.up_proj.weight"], weights[f"{prefix}mlp.down_proj.weight"]
        channels = torch.randperm(up.shape[0], generator=generator)[:MLP_CHANNELS]
        up[channels] *= FACTOR
        down[:, channels] /= FACTOR
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
