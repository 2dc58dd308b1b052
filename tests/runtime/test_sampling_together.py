"""All ways of sampling at once, beside each other, one step ahead, through preemption, prefix hits and cancellations: each token is the one
that a plain reference chooses after the tokens before it, from transformers' logits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gantline_kernels.reference import kept_probabilities
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.sampling.random import uniforms

from tests.runtime.checkpoints import VOCAB, write_checkpoint

EOS = 2
CLOSE = 5e-4
"""Of a cumulative probability: closer to a boundary than this, either side may be taken."""


def random_sampling(rng: random.Random) -> SamplingParams:
    chosen: dict[str, Any] = {
        "max_new_tokens": rng.choice([1, 30, 80]), "temperature": rng.choice([0.0, 0.7, 1.5]), "seed": rng.randrange(-(1 << 63), 1 << 63),
        "ignore_eos": rng.random() < 0.7, "num_logprobs": rng.choice([None, 0, 20]),
    }  # fmt: skip
    kinds: dict[str, Any] = {
        "top_k": rng.choice([1, 5, 40, 5000]), "top_p": rng.choice([0.3, 0.9]), "min_p": rng.choice([0.01, 0.2]),
        "repetition_penalty": rng.choice([0.5, 1.3]), "presence_penalty": rng.choice([-1, 1.5]), "frequency_penalty": rng.choice([-1, 1.0]),
        "logit_bias": {rng.randrange(VOCAB): rng.uniform(-5, 5) for _ in range(20)}, "min_new_tokens": rng.choice([5, 30]),
        "bad_words": tuple(tuple(rng.randrange(VOCAB) for _ in range(length)) for length in (1, 1, 2, 3)),
        "stop_token_ids": tuple(rng.randrange(VOCAB) for _ in range(4)),
    }  # fmt: skip
    return SamplingParams(**chosen, **{name: value for name, value in kinds.items() if rng.random() < 0.4})


def edited(logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int], stops: set[int]) -> torch.Tensor:
    """float64 [V], step by step as docs/server.md has it."""
    row = logits.double().clone()
    for token in {*prompt, *output}:
        row[token] = row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
    for token in set(output):
        row[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias.items():
        row[token] += bias
    forbidden = stops if len(output) < params.min_new_tokens else set()
    forbidden = forbidden | {word[-1] for word in params.bad_words if tuple([-1, *output][len(output) + 2 - len(word) :]) == word[:-1]}
    row[list(forbidden)] = -torch.inf
    return row


def may_be_chosen(token: int, row: torch.Tensor, params: SamplingParams, position: int) -> bool:
    if params.temperature == 0.0:
        return bool(row[token] >= row.max() - 1e-3)
    seed = np.array([params.seed or 0], dtype=np.int64).view(np.uint64)
    uniform = float(uniforms(seed, np.array([position], dtype=np.uint64))[0])
    for nudge in (0.0, -CLOSE, CLOSE):  # of a limit that falls between two tokens as close as that
        top_p = min(1.0, max(1e-6, params.top_p + nudge)) if params.top_p < 1 else 1.0
        kept = kept_probabilities(row, params.temperature, params.top_k, top_p, params.min_p * (1 + nudge))
        ends = kept.cumsum(dim=0) / kept.sum()
        if ends[token] - kept[token] / kept.sum() - CLOSE <= uniform <= ends[token] + CLOSE:
            return True
    return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint("llama", tmp_path_factory.mktemp("together") / "model")


@pytest.mark.parametrize("blocks", [12, 64])
def test_every_token_is_the_one_that_a_plain_reference_chooses(model: Path, blocks: int) -> None:
    from transformers import AutoModelForCausalLM

    rng = random.Random(blocks)
    engine = LLMEngine(
        model, EngineConfig(block_size=16, num_cache_blocks=blocks, session_len=160, max_batch_size=6, max_prefill_token_num=40)
    )
    engine._executor.depth = 1  # type: ignore[attr-defined]  # as on a GPU
    shared = [rng.randrange(3, VOCAB) for _ in range(60)]
    requests = [
        EngineRequest(request_id=str(i), prompt_ids=shared[: rng.randint(1, 60)] + [3 + i], sampling=random_sampling(rng))
        for i in range(24)
    ]
    waiting, outputs = list(requests), {item.request_id: ([], []) for item in requests}  # type: ignore[var-annotated]
    while waiting or engine.has_work():
        if waiting and rng.random() < 0.3:
            engine.add_request(waiting.pop())
        if rng.random() < 0.02:
            engine.abort(rng.choice(sorted(outputs)))
        for output in engine.step():
            tokens, logprobs = outputs[output.request_id]
            tokens += output.token_ids
            logprobs += output.logprobs or [None]
        engine.check_integrity()
    stats = engine.stats()
    engine.close()
    assert stats.cache_usage == 0 and bool(stats.num_preemptions) == (blocks == 12) and stats.num_cached_tokens > 0
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for item in requests:
        params, prompt, (tokens, logprobs) = item.sampling, item.prompt_ids, outputs[item.request_id]
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
        with torch.inference_mode():
            rows = reference(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 :]
        for i, token in enumerate(tokens):
            row = edited(rows[i], params, prompt, tokens[:i], stops)
            assert may_be_chosen(token, row, params, len(prompt) + i), (item, i)
            expected = rows[i].log_softmax(dim=-1)
            if params.num_logprobs is None:
                assert logprobs[i] is None
            else:
                assert logprobs[i].chosen == pytest.approx(expected[token].item(), abs=1e-3)
                assert logprobs[i].top_logprobs == pytest.approx(expected.topk(params.num_logprobs).values.tolist(), abs=1e-3)
