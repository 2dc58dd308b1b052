"""The reference that figures are judged by is transformers' own, however its attention is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import checks, workloads
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


def test_rows_are_checked_on_eight_requests_and_on_more_where_these_say_little() -> None:
    for name in ("chat", "decode", "prefix", "batch16"):
        requests = workloads.build(name).requests
        chosen = checks.choose(requests)
        assert len(set(chosen)) == 8
        assert max(len(prompt) + count for prompt, count in requests) == max(len(requests[i][0]) + requests[i][1] for i in chosen)
    requests = workloads.build("prefill").requests
    chosen = checks.choose(requests)
    assert len(set(chosen)) == 32 and sum(requests[i][1] for i in chosen) >= 500
    assert checks.choose(workloads.build("single").requests) == [0]
