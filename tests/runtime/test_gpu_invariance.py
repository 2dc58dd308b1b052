"""`batch_invariant` by Triton's kernels: tokens and log-probabilities to the last bit, on a GPU, and under the interpreter elsewhere.

Alone, beside 64 other requests, in other chunks, by graphs and eagerly, from the prefix cache; contexts of one piece and of several.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine

from tests.runtime.checkpoints import write_checkpoint
from tests.runtime.invariance import ask_all, prompts_of
from tests.runtime.test_awq_engine import quantize_randomly

ROOT = Path(__file__).parents[2]
VOCAB = 32_000
LENGTHS = [1, 17, 63, 64, 65, 300, 1100, 2600]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "128": ("qwen3", {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 2048}),
    "64, a window": ("mistral-window", {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1408, "sliding_window": 700}),
    "64, AWQ": ("llama", {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1024}),
}


def test_an_engine_says_the_same_of_a_request_under_the_interpreter(tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3", tmp_path / "model", intermediate_size=176, num_hidden_layers=1)
    environment = os.environ | {"TRITON_INTERPRET": "1", "GANTLINE_KERNEL_BACKEND": "invariant_triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.invariance", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_says_the_same_of_a_request_on_a_gpu(name: str, tmp_path: Path) -> None:
    family, sizes = MODELS[name]
    folder = write_checkpoint(family, tmp_path / "model", vocab_size=VOCAB, max_position_embeddings=4096, **sizes)
    if "AWQ" in name:
        folder = quantize_randomly(folder, tmp_path / "awq", skipped=())
    prompts, others = prompts_of(LENGTHS, VOCAB), prompts_of([40 * i % 701 + 1 for i in range(64)], VOCAB, seed=1)

    def make(**settings: Any) -> LLMEngine:
        fixed = {"dtype": "bfloat16", "batch_invariant": True, "num_cache_blocks": 2048, "max_batch_size": 64}
        return LLMEngine(folder, EngineConfig(**{**fixed, **settings}))

    engine = make()
    alone = ask_all(engine, prompts, 24, together=False)
    assert ask_all(engine, prompts, 24, together=False) == alone, "by graphs"
    assert ask_all(engine, prompts, 24, together=True, others=others) == alone, "beside others"
    before = engine.stats().num_cached_tokens
    assert ask_all(engine, prompts, 24, together=True) == alone, "from the cache"
    assert engine.stats().num_cached_tokens > before
    engine.close()
    for settings in ({"max_prefill_token_num": 100, "eager_mode": True}, {"max_prefill_token_num": 1500, "max_batch_size": 7}):
        engine = make(**settings)
        assert ask_all(engine, prompts, 24, together=True, others=others[:20]) == alone, settings
        engine.close()
