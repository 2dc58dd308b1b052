"""Small checkpoints with random weights, of all families and their variants, as transformers itself writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 512

_SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-llama3-rope": (
        "llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4}
        | _rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    "llama-biases-linear-rope": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "num_key_value_heads": 1} | _rope(rope_type="linear", factor=4.0),
    ),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "mistral-no-window-yarn": (
        "mistral", {"sliding_window": None} | _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=256),
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-in-upper-layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biases-dynamic-rope": ("qwen3", {"head_dim": 16, "attention_bias": True} | _rope(rope_type="dynamic", factor=2.0)),
}  # fmt: skip


def write_checkpoint(name: str, folder: Path, **overrides: Any) -> Path:
    """The configuration `name`, `overrides` applied, with weights large enough that logits differ clearly and positions matter."""
    import transformers

    family, changes = CONFIGURATIONS[name]
    prefix = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SMALL, **changes, **overrides})
    torch.manual_seed(20261120)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder
