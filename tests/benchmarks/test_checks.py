"""The reference that figures are judged by is transformers' own, however its attention is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import checks
from tests.runtime.checkpoints import write_checkpoint


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
@torch.inference_mode()
def test_the_exact_attention_of_the_reference_is_transformers_own(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(name, tmp_path / "model")
    ids = torch.arange(3, 103).unsqueeze(0)
    logits = []
    for options in ({"attn_implementation": "eager"}, {"attn_implementation": checks._exact_attention()}):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=1e-3)
    assert logits[0].std() > 0.1
