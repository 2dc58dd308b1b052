"""What is read of prompts (log-probabilities, pooled hidden states) is exact however they are cut, cached or preempted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams, TokenOutput
from gantline_runtime.prompt_reads import SCORE_ROWS
from gantline_runtime.request import RequestRejected

from tests.runtime.checkpoints import VOCAB, write_checkpoint
from tests.runtime.engine_support import VOCAB as FAKE_VOCAB
from tests.runtime.engine_support import drain, expected_tokens, fake_engine, fake_hidden, fake_logprob, tokens_of


def _reading(name: str, prompt: list[int], count: int = 0, **wanted: Any) -> EngineRequest:
    sampling = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_ids=prompt, sampling=sampling, **wanted)


def _scores(outputs: list[TokenOutput]) -> list[float]:
    """All chunks put together; each must begin where the one before ended."""
    values: list[float] = []
    for output in outputs:
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs.start == len(values) + 1
            values += output.prompt_logprobs.chosen
    return values


def _embedding(outputs: list[TokenOutput]) -> list[float]:
    (output,) = outputs
    return np.frombuffer(output.embedding, dtype="<f4").tolist()  # type: ignore[no-any-return]


def _prompts(count: int, longest: int) -> list[list[int]]:
    """Pairs of prompts with the same beginning, so that the prefix cache has something to offer."""
    rng = random.Random(5)
    made = [[rng.randrange(FAKE_VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]
    return [(made[i - 1][:32] + p)[:longest] if i % 2 else p for i, p in enumerate(made)]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("chunk", [8, 13, 64, 1024])
@pytest.mark.parametrize("blocks", [64, 20])
def test_prompts_are_read_once_and_wholly_whatever_the_chunks_the_cache_and_preemption_do(depth: int, chunk: int, blocks: int) -> None:
    engine, _ = fake_engine(depth=depth, max_prefill_token_num=chunk, num_cache_blocks=blocks)
    work = _prompts(32, 120 if blocks > 20 else 40)
    for i, prompt in enumerate(work):
        wanted: dict[str, Any] = [
            {"count": 60, "num_prompt_logprobs": 0},
            {"num_prompt_logprobs": 0},
            {"pooling": "mean"},
            {"pooling": "last"},
        ][i // 2 % 4]
        engine.add_request(_reading(str(i), prompt, **wanted))
    outputs = drain(engine)
    for i, prompt in enumerate(work):
        got = outputs[str(i)]
        hidden = [fake_hidden(prompt[: p + 1]) for p in range(len(prompt))]
        scores = [fake_logprob(prompt[: p + 1], prompt[p + 1]) for p in range(len(prompt) - 1)]
        match i // 2 % 4:
            case 0:
                assert _scores(got) == scores and tokens_of(got) == expected_tokens(prompt, 60), i
            case 1:
                assert _scores(got) == scores and tokens_of(got) == [] and got[-1].finish_reason == "length", i
            case 2:
                assert _embedding(got) == pytest.approx([sum(hidden) / len(prompt)]), i
            case 3:
                assert _embedding(got) == [hidden[-1]], i
    stats = engine.stats()
    assert stats.num_preemptions > 0 or blocks > 20 or chunk == 8
    assert (stats.num_running, stats.num_waiting, stats.cache_usage) == (0, 0, 0.0) and not engine.has_work()
    assert stats.num_generated_tokens == 60 * 8


def test_a_prompt_that_is_read_publishes_its_blocks_but_only_a_last_token_is_read_from_the_cache() -> None:
    engine, _ = fake_engine()
    prompt = list(range(100))
    cached = []
    for i, wanted in enumerate(({"num_prompt_logprobs": 0}, {"pooling": "mean"}, {"pooling": "last"})):
        engine.add_request(_reading(str(i), prompt, **wanted))  # type: ignore[arg-type]
        cached.append(drain(engine)[str(i)][-1].num_cached_tokens)
    assert cached == [0, 0, 96]


def test_a_request_for_its_prompt_alone_may_fill_the_whole_context() -> None:
    engine, _ = fake_engine(session_len=64)
    engine.add_request(_reading("a", [1] * 64, num_prompt_logprobs=0))
    assert len(_scores(drain(engine)["a"])) == 63
    for request in (
        _reading("b", [1] * 65, num_prompt_logprobs=0),
        _reading("c", [1] * 64, count=1, num_prompt_logprobs=0),
        _reading("d", [1]),
        _reading("e", [1], count=1, pooling="mean"),
    ):
        with pytest.raises(RequestRejected):
            engine.add_request(request)


def test_a_request_that_is_aborted_while_its_prompt_is_read_leaves_nothing() -> None:
    engine, _ = fake_engine(depth=1, max_prefill_token_num=16)
    engine.add_request(_reading("a", [1] * 100, pooling="mean"))
    engine.step()
    engine.step()
    assert engine.abort("a")
    assert drain(engine) == {} and engine.stats().cache_usage == 0.0


# ---- with a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint("qwen2-tied", tmp_path_factory.mktemp("reads") / "model")


@pytest.mark.parametrize("settings", [{"max_prefill_token_num": 512}, {"max_prefill_token_num": 48}, {"tp": 2}])
def test_log_probabilities_and_hidden_states_are_those_of_transformers(model: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    rng = random.Random(7)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (SCORE_ROWS + 30, 17, 64, 1)]
    fixed: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 16, "num_cache_blocks": 128, "session_len": 512}
    engine = LLMEngine(model, EngineConfig(**fixed, max_batch_size=8, **settings))
    try:
        for i, prompt in enumerate(prompts):
            engine.add_request(_reading(f"score-{i}", prompt, count=i % 2, num_prompt_logprobs=3))
            engine.add_request(_reading(f"mean-{i}", prompt, pooling="mean"))
            engine.add_request(_reading(f"last-{i}", prompt, pooling="last"))
        outputs = drain(engine, checked=False)
    finally:
        engine.close()
    reference: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            result = reference(torch.tensor([prompt]), output_hidden_states=True)
        hidden, logprobs = result.hidden_states[-1][0], result.logits[0].log_softmax(-1)
        scores = _scores(outputs[f"score-{i}"])
        expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(scores, expected.numpy(), atol=2e-4)
        ranks = [rank for output in outputs[f"score-{i}"] if output.prompt_logprobs for rank in output.prompt_logprobs.ranks]
        assert ranks == ((logprobs[:-1] > expected.unsqueeze(1) + 1e-5).sum(1) + 1).tolist()
        top = [row for output in outputs[f"score-{i}"] if output.prompt_logprobs for row in output.prompt_logprobs.top_logprobs]
        if len(prompt) > 1:
            np.testing.assert_allclose(top, logprobs[:-1].topk(3).values.numpy(), atol=2e-4)
        np.testing.assert_allclose(_embedding(outputs[f"mean-{i}"]), hidden.mean(0).numpy(), atol=2e-4)
        np.testing.assert_allclose(_embedding(outputs[f"last-{i}"]), hidden[-1].numpy(), atol=2e-4)


def test_logits_of_a_long_chunk_never_exist_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gantline_runtime.models.decoder import Decoder

    rows: list[int] = []
    original = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: (rows.append(len(hidden)), original(self, hidden))[1])
    engine = LLMEngine(model, EngineConfig(device="cpu", num_cache_blocks=64, session_len=1024, max_prefill_token_num=1024))
    engine.add_request(_reading("a", [i % VOCAB for i in range(1000)], num_prompt_logprobs=0))
    assert len(_scores(drain(engine)["a"])) == 999
    engine.close()
    assert sum(rows) == 999 and max(rows) == SCORE_ROWS
