"""The engine on a GPU: graphs, overlap, preemption and prefix reuse against transformers; run with `pytest -m gpu tests/runtime`.

Small random models of head dimensions 64, 128 and 256 in bf16; what the engine generates is judged as in the benchmarks (`checks.py`):
errors of log-probabilities within 1.5 times those of transformers' own bf16.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.graphs import DecodeGraphs, decode_sizes
from gantline_runtime.messages import TokenOutput

from benchmarks.checks import Sample, check
from tests.runtime.checkpoints import write_checkpoint
from tests.runtime.engine_support import drain, request, tokens_of

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCAB = 32_000
LONGEST = 32_768
MODELS: dict[int, tuple[str, dict[str, Any]]] = {
    64: ("llama", {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1024}),
    128: ("qwen3", {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 2048}),
    256: ("mistral-no-window-yarn", {"hidden_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}),
}


def test_decode_classes_waste_at_most_eight_rows_to_256_and_cover_every_size() -> None:
    for largest in (1, 3, 16, 100, 256, 512, 4096):
        sizes = decode_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(largest, 512)
        for n in range(1, min(largest, 256) + 1):
            assert min(s for s in sizes if s >= n) - n < 8


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, sizes = MODELS[request.param]
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": LONGEST + 64, **sizes}
    return write_checkpoint(family, tmp_path_factory.mktemp("gpu") / "model", **sizes)


def make_engine(model: Path, **settings: Any) -> LLMEngine:
    defaults: dict[str, Any] = {"dtype": "bfloat16", "max_batch_size": 256, "max_waiting": 4096, "num_cache_blocks": 8192}
    return LLMEngine(model, EngineConfig(**{**defaults, **settings}))


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def run(engine: LLMEngine, prompts: list[list[int]], count: int) -> list[list[TokenOutput]]:
    for i, prompt in enumerate(prompts):
        engine.add_request(request(str(i), prompt, count=count, num_logprobs=0))
    outputs = drain(engine, checked=False)
    engine.check_integrity()
    return [outputs[str(i)] for i in range(len(prompts))]


def samples(prompts: list[list[int]], outputs: list[list[TokenOutput]], chosen: list[int]) -> list[Sample]:
    return [Sample(prompts[i], tokens_of(outputs[i]), [o.logprobs[0].chosen for o in outputs[i] if o.logprobs]) for i in chosen]


@pytest.mark.parametrize("batch", [1, 17, 256])
class TestOnTheGpu:
    pytestmark = gpu

    def test_contexts_of_1_to_32k_agree_with_transformers_through_graphs_and_after_a_prefix_hit(self, model: Path, batch: int) -> None:
        lengths = [1, 2, 63, 64, 65, 1000, 4096, 16_000, LONGEST - 64][: max(1, batch)]
        if batch == 1:
            lengths = [LONGEST - 64]
        lengths += [random.Random(i).randint(1, 600) for i in range(batch - len(lengths))]
        prompts = prompts_of(lengths)
        engine = make_engine(model)
        first = run(engine, prompts, 48)
        again = run(engine, prompts, 48)
        assert engine.stats().num_captures > 0
        assert any(outputs[0].num_cached_tokens for outputs in again)
        assert engine.stats().longest_capture_s < 0.1
        engine.close()
        chosen = list(range(min(9, batch)))
        verdicts = check(model, {"first": samples(prompts, first, chosen), "hit": samples(prompts, again, chosen)})
        assert all(verdict["passed"] for verdict in verdicts.values()), verdicts

    def test_preempted_requests_agree_with_transformers(self, model: Path, batch: int) -> None:
        if batch == 1:
            pytest.skip("one request alone is never preempted")
        prompts = prompts_of([random.Random(i).randint(1, 300) for i in range(batch)])
        engine = make_engine(model, num_cache_blocks=batch * 4, session_len=512, max_prefill_token_num=2048)
        outputs = run(engine, prompts, 200)
        assert engine.stats().num_preemptions > 0
        engine.close()
        verdicts = check(model, {"preempted": samples(prompts, outputs, list(range(8)))})
        assert verdicts["preempted"]["passed"], verdicts

    def test_eager_and_graph_give_identical_tokens_at_the_same_padded_batch(
        self, model: Path, batch: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = prompts_of([random.Random(i).randint(1, 200) for i in range(batch)], seed=1)

        def run_eagerly(self: DecodeGraphs, shape: Any) -> None:
            self._forward(shape)

        graph_engine = make_engine(model, enable_prefix_caching=False)
        by_graph = run(graph_engine, prompts, 64)
        assert graph_engine.stats().num_captures > 0
        graph_engine.close()
        monkeypatch.setattr(DecodeGraphs, "run", run_eagerly)
        eager_engine = make_engine(model, enable_prefix_caching=False)
        eagerly = run(eager_engine, prompts, 64)
        assert eager_engine.stats().num_captures == 0
        eager_engine.close()
        assert [tokens_of(o) for o in by_graph] == [tokens_of(o) for o in eagerly]
        assert [[o.logprobs for o in outputs] for outputs in by_graph] == [[o.logprobs for o in outputs] for outputs in eagerly]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_heaviest_mixed_load_at_a_share_of_nine_tenths_stays_within_memory(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model", vocab_size=128_256, hidden_size=1024, max_position_embeddings=8192)
    engine = make_engine(folder, num_cache_blocks=None, cache_max_entry_count=0.9)
    rng = random.Random(0)
    for i in range(400):
        sampling = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.1, "num_logprobs": 20} if i % 2 else {}
        prompt = [rng.randrange(128_256) for _ in range(rng.randint(1, 4000))]
        engine.add_request(request(str(i), prompt, count=rng.randint(1, 200), **sampling))
    assert len(drain(engine, checked=False)) == 400
    memory = engine.stats().memory
    free, total = torch.cuda.mem_get_info()
    print(f"measured: {memory}; free at the end {free} of {total}")
    assert free > 0.02 * total
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_over_nccl_agree_with_transformers(tmp_path: Path) -> None:
    family, sizes = MODELS[128]
    folder = write_checkpoint(family, tmp_path / "model", vocab_size=VOCAB, **sizes)
    prompts = prompts_of([random.Random(i).randint(1, 900) for i in range(40)])
    engine = make_engine(folder, tp=2, session_len=1024)
    outputs = run(engine, prompts, 64)
    assert engine.stats().num_captures > 0
    engine.close()
    verdicts = check(folder, {"tp2": samples(prompts, outputs, list(range(8)))})
    assert verdicts["tp2"]["passed"], verdicts
