"""Sampling: parameters reach the right rows, random numbers depend on seed and position alone, filters and penalties do what they say."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gantline_kernels import api
from gantline_runtime import sizing
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams, TokenOutput
from gantline_runtime.request import Sequence
from gantline_runtime.sampling import Sampler, SamplingTable
from gantline_runtime.sampling.random import uniforms
from gantline_runtime.scheduler import Step
from gantline_runtime.server import protocol
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runtime.checkpoints import VOCAB, write_checkpoint
from tests.runtime.engine_support import drain, request, tokens_of

V = 50


def sequence(slot: int, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    made = Sequence(
        EngineRequest(request_id=str(slot), prompt_ids=prompt or [1], sampling=SamplingParams(**params)),
        arrival=slot, session_len=1024, eos_token_ids=(2,), vocab_size=V,
    )  # fmt: skip
    made.slot = slot
    made.tokens.extend(output or [])
    made.num_sampled = len(output or []) + 1  # with the sample that is being made
    return made


def sample(logits: torch.Tensor, sequences: list[Sequence], *, num_decodes: int = 0) -> Any:
    table = SamplingTable(16)
    for member in sequences[:num_decodes]:
        table.set(member)
    step = Step(samples=sequences, num_decodes=num_decodes, sample_rows=list(range(len(sequences))))
    sampler = Sampler(max_slots=16, vocab_size=V, device=torch.device("cpu"), backend="torch")
    return sampler(logits, table.batch(step), torch.tensor([s.slot for s in sequences]), torch.zeros(16, dtype=torch.int64))


def random_logits(rows: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_position_only() -> None:
    seeds, positions = np.repeat(np.arange(200, dtype=np.uint64), 200), np.tile(np.arange(200, dtype=np.uint64), 200)
    values = uniforms(seeds, positions)
    assert values.min() >= 0.0 and values.max() < 1.0
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    chi2 = ((counts - len(values) / 64) ** 2 / (len(values) / 64)).sum()
    assert chi2 < 110, "63 degrees of freedom: one in 5000 exceeds this by chance"
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert uniforms(seeds[77:78], positions[77:78])[0] == values[77]
    assert len(np.unique(values)) > 0.99 * len(values) * (1 - len(values) / 2**25)


def test_greedy_requests_need_no_parameters_on_the_device() -> None:
    sequences = [sequence(i, temperature=0.0) for i in range(3)]
    assert SamplingTable(16).batch(Step(samples=sequences, num_decodes=0)) is None


def test_rows_of_all_kinds_mix_and_do_not_influence_each_other() -> None:
    logits = random_logits(5)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.7, "seed": 6, "top_k": 3},
        {"temperature": 0.0, "logit_bias": {9: 100.0}},
        {"temperature": 1.3, "seed": 7, "top_p": 0.5, "repetition_penalty": 1.5},
    ]
    together = sample(logits, [sequence(i, **kind) for i, kind in enumerate(kinds)]).tokens.tolist()
    alone = [sample(logits[i : i + 1], [sequence(i, **kind)]).tokens.item() for i, kind in enumerate(kinds)]
    assert together == alone
    assert together[0] == logits[0].argmax()
    assert together[3] == 9


def test_draws_follow_the_distribution_at_each_temperature() -> None:
    logits = random_logits(1, scale=1.0)
    count = 4000
    random = uniforms(np.arange(count, dtype=np.uint64), np.full(count, 1, dtype=np.uint64))
    for temperature in (0.5, 1.0, 2.0):
        drawn = api.sample(logits.expand(count, -1), torch.from_numpy(random), torch.full((count,), temperature), backend="torch")
        expected = (logits[0] / temperature).softmax(-1) * count
        observed = torch.bincount(drawn, minlength=V)
        assert float(((observed - expected) ** 2 / expected).sum()) < 100, "49 degrees of freedom"


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.6}, {0, 1}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 2, "top_p": 0.99}, {0, 1}),
        ({"top_p": 0.01}, {0}),
        ({"top_k": 1}, {0}),
    ],
)
def test_filters_keep_exactly_the_likeliest(params: dict[str, Any], allowed: set[int]) -> None:
    logits = torch.full((1, V), -30.0)
    logits[0, :4] = torch.tensor([0.4, 0.3, 0.18, 0.12]).log()
    seen = {sample(logits, [sequence(0, temperature=1.0, seed=seed, **params)]).tokens.item() for seed in range(200)}
    assert seen == allowed


def test_penalties_count_prompt_and_output_as_each_is_defined() -> None:
    logits = random_logits(1)
    prompt, output = [3, 4, 5], [7, 7, 8]
    made = sequence(0, prompt, output, temperature=0.0, repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3)
    expected = logits[0].clone()
    for token in {3, 4, 5, 7, 8}:
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token, times in ((7, 2), (8, 1)):
        expected[token] -= 0.4 + 0.3 * times
    sampler = Sampler(max_slots=4, vocab_size=V, device=torch.device("cpu"), backend="torch")
    batch = SamplingTable(4).batch(Step(samples=[made], num_decodes=0))
    assert batch is not None
    torch.testing.assert_close(sampler._penalize(logits, batch, torch.tensor([0]))[0], expected)


@pytest.mark.parametrize("times", [32_766, 40_000])
def test_a_token_that_has_come_more_often_than_is_counted_stays_penalized(times: int) -> None:
    """As it comes once more and again, and when a request that was preempted comes back with so many."""
    made = sequence(0, [3], [7] * times, temperature=0.0, frequency_penalty=0.01)
    table, sampler = SamplingTable(4), Sampler(max_slots=4, vocab_size=V, device=torch.device("cpu"), backend="torch")
    logits = torch.zeros(1, V)
    logits[0, 7] = 400.0
    for wanted in (min(times, 32_767), 32_767, 32_767):
        batch = table.batch(Step(samples=[made], num_decodes=int(wanted != min(times, 32_767)), sample_rows=[0]))
        assert batch is not None
        assert sampler._penalize(logits, batch, torch.tensor([0]))[0, 7] == pytest.approx(400.0 - 0.01 * wanted)
        assert sampler(logits, batch, torch.tensor([0]), torch.zeros(4, dtype=torch.int64)).tokens.tolist() == [7]


class Operators(TorchDispatchMode):
    """Counts what is launched; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_sampling_takes_as_many_launches_for_a_dozen_requests_as_for_one() -> None:
    everything: dict[str, Any] = {
        "temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.5,
        "frequency_penalty": 0.5, "logit_bias": {3: 1.0, 4: -1.0}, "bad_words": ((7,), (5, 6)), "min_new_tokens": 9, "num_logprobs": 20,
    }  # fmt: skip
    counts = []
    for rows in (1, 12):
        with Operators() as operators:
            sample(random_logits(rows), [sequence(i, [i, 5, i], [i + 9] * i, **everything) for i in range(rows)])
        counts.append(operators.count)
    assert counts[0] == counts[1] > 20


def test_penalties_of_requests_that_come_together_are_each_their_own() -> None:
    logits = random_logits(3)
    kinds = [([3, 4], [7, 7, 8]), ([7], []), ([9, 9], [3])]
    made = [sequence(2 * i, *tokens, temperature=0.0, presence_penalty=20.0, repetition_penalty=9.0) for i, tokens in enumerate(kinds)]
    together = sample(logits, made).tokens.tolist()
    assert together == [sample(logits[i : i + 1], [one]).tokens.item() for i, one in enumerate(made)]


def test_bias_and_forbidden_stops_change_only_their_own_rows() -> None:
    logits = torch.zeros(3, V)
    logits[:, 2] = 5.0  # the end of sequence is likeliest everywhere
    logits[:, 6] = 4.0
    made = [
        sequence(0, temperature=0.0),
        sequence(1, temperature=0.0, min_new_tokens=3),
        sequence(2, temperature=0.0, logit_bias={6: -10.0, 2: -10.0, 8: 1.0}),
    ]
    assert sample(logits, made).tokens.tolist() == [2, 6, 8]
    made[1].num_sampled = 4
    assert sample(logits[1:2], made[1:2]).tokens.tolist() == [2], "the fourth token may be a stop"


@pytest.mark.parametrize("on_device", [False, True])
def test_bad_words_are_forbidden_where_and_only_where_they_would_be_completed(on_device: bool) -> None:
    """Against a plain search: words of one to four tokens of three, so that many are begun. The last token may be on the device alone."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        output = rng.integers(10, 13, rng.integers(1 if on_device else 0, 9)).tolist()
        words = tuple(tuple(rng.integers(10, 13, rng.integers(1, 5)).tolist()) for _ in range(6))
        made = sequence(0, [10, 11, 12], output, temperature=0.0, bad_words=words)
        if on_device:
            del made.tokens[-1]
        table = SamplingTable(16)
        table.set(made)
        batch = table.batch(Step(samples=[made], num_decodes=int(on_device), sample_rows=[0]))
        assert batch is not None
        last = torch.tensor([output[-1] if output else 0])
        sampler = Sampler(max_slots=16, vocab_size=V, device=torch.device("cpu"), backend="torch")
        edited = torch.zeros(1, V)
        if batch.edits is not None:
            sampler._edit(edited, batch.edits, torch.tensor([0]), last)
        expected = {word[-1] for word in words if output[len(output) - len(word) + 1 :] == list(word[:-1]) and len(word) <= len(output) + 1}
        assert set(torch.nonzero(edited[0]).flatten().tolist()) == expected, (output, words)


def test_of_edits_the_device_is_told_what_is_new_and_no_more() -> None:
    """The largest request comes last, a slot is taken over by a request with fewer changes, and another's answer may end from then on."""
    logits = random_logits(3, scale=0.1)
    words = {"bad_words": ((1,), (9, 2), (9, 8, 7))}
    first = [
        sequence(0, output=[9], temperature=0.0, logit_bias={t: 2.0 * t for t in range(40, V)}),
        sequence(1, output=[8, 9, 8], temperature=0.0, min_new_tokens=5, logit_bias={2: 50.0}),
    ]
    large = sequence(2, temperature=0.0, logit_bias={t: float(t) for t in range(V)}, **words)
    taken = sequence(0, [3], [9, 8], temperature=0.0, logit_bias={7: 5.0, 6: 4.0}, **words)
    table, sampler = SamplingTable(16), Sampler(max_slots=16, vocab_size=V, device=torch.device("cpu"), backend="torch")
    last = torch.full((16,), 9)

    def step(members: list[Sequence], num_decodes: int) -> tuple[list[int], list[int] | None]:
        batch = table.batch(Step(samples=members, num_decodes=num_decodes, sample_rows=list(range(len(members)))))
        assert batch is not None and batch.edits is not None
        sent = None if batch.edits.fresh is None else batch.edits.fresh.slots.tolist()
        return sampler(logits[: len(members)], batch, torch.tensor([m.slot for m in members]), last).tokens.tolist(), sent

    likeliest = int(logits[1].index_fill(0, torch.tensor([2]), -math.inf).argmax())
    assert step(first, 0) == ([V - 1, likeliest], [0, 1])
    assert step(first, 2) == ([V - 1, likeliest], None)
    assert step([*first, large], 2) == ([V - 1, likeliest, V - 1], [2])
    first[1].num_sampled = 6
    assert step([first[1], taken], 1) == ([2, 6], [0, 1]), "the end is no longer held back, and 9, 8, 7 would be a bad word"
    last[0] = 8
    assert step([first[1], taken], 2) == ([2, 6], None)
    last[0] = 7
    assert step([first[1], taken], 2) == ([2, 7], None)


def test_a_request_keeps_no_more_on_the_device_than_is_reserved_for_it() -> None:
    most = protocol.MAX_BIASES + protocol.MAX_STOP_IDS + 2 * protocol.MAX_BAD_WORDS
    assert 3 * 4 * most < sizing.EDIT_BYTES


def test_what_edits_cost_the_host_does_not_grow_with_the_answer() -> None:
    words = tuple((i, i + 1, i + 2) for i in range(20, 40))
    seconds = []
    for length in (100, 30_000):
        made = [sequence(i, [3], [5] * length, temperature=0.0, bad_words=words) for i in range(4)]
        table, step = SamplingTable(16), Step(samples=made, num_decodes=4, sample_rows=[0, 1, 2, 3])
        for member in made:
            table.set(member)
        times = []
        for _ in range(20):
            started = time.thread_time()
            table.batch(step)
            times.append(time.thread_time() - started)
        seconds.append(min(times))
    assert seconds[1] < 3 * seconds[0]


def test_logprobs_are_those_of_the_untouched_distribution() -> None:
    logits = random_logits(3)
    made = [
        sequence(0, temperature=0.0, num_logprobs=0),
        sequence(1, temperature=0.0),
        sequence(2, temperature=2.0, seed=1, top_k=5, logit_bias={3: 50.0}, num_logprobs=20),
    ]
    result = sample(logits, made)
    expected = logits.log_softmax(-1)
    assert result.tokens[2] == 3
    torch.testing.assert_close(result.chosen_logprobs, torch.stack([expected[0].max(), expected[2, 3]]))
    torch.testing.assert_close(result.top_logprobs[1], expected[2].sort(descending=True).values[:20])


# ---- through the engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint("llama", tmp_path_factory.mktemp("sampling") / "model")


def engine(model: Path, **settings: Any) -> LLMEngine:
    defaults: dict[str, Any] = {
        "block_size": 16,
        "num_cache_blocks": 128,
        "session_len": 256,
        "max_batch_size": 16,
        "max_prefill_token_num": 64,
    }
    return LLMEngine(model, EngineConfig(**{**defaults, **settings}))


def outputs_of(model: Path, requests: list[EngineRequest], **settings: Any) -> dict[str, list[TokenOutput]]:
    running = engine(model, **settings)
    for item in requests:
        running.add_request(item)
    try:
        return drain(running)
    finally:
        running.close()


def test_a_seeded_request_gives_the_same_tokens_whatever_runs_beside_it_and_even_when_preempted(model: Path) -> None:
    subject = request("subject", [5, 6, 7, 8], count=60, temperature=1.0, top_p=0.95, seed=42)
    crowd = [request(str(i), [i, 9, 9] * (i + 1), count=100, temperature=0.9, seed=i) for i in range(12)]
    alone = tokens_of(outputs_of(model, [subject])["subject"])
    beside = tokens_of(outputs_of(model, [*crowd[:6], subject, *crowd[6:]])["subject"])
    pressed = tokens_of(outputs_of(model, [*crowd[:6], subject, *crowd[6:]], num_cache_blocks=24)["subject"])
    assert alone == beside == pressed
    other = request("subject", [5, 6, 7, 8], count=60, temperature=1.0, top_p=0.95, seed=43)
    assert alone != tokens_of(outputs_of(model, [other])["subject"])


def test_a_temperature_next_to_zero_takes_the_likeliest_token(model: Path) -> None:
    """Logits over 1e-38 leave float32: what came was no number, and the vocabulary's last token was taken."""
    kinds = [{"temperature": degree, **more} for degree in (0.0, 1e-6, 1e-38, 1e-45) for more in ({}, {"top_p": 0.9})]
    made = outputs_of(model, [request(str(i), [5, 6, 7], count=20, seed=i, **kind) for i, kind in enumerate(kinds)])
    assert len({tuple(tokens_of(parts)) for parts in made.values()}) == 1


def test_requests_without_a_seed_differ(model: Path) -> None:
    made = outputs_of(model, [request(str(i), [5, 6], count=30, temperature=1.5) for i in range(4)])
    assert len({tuple(tokens_of(o)) for o in made.values()}) == 4


@pytest.mark.parametrize("blocks", [128, 20])
def test_penalties_survive_preemption(model: Path, blocks: int) -> None:
    work = [request(str(i), [i + 3, 4, 5], count=80, frequency_penalty=1.5, repetition_penalty=1.2) for i in range(8)]
    made = outputs_of(model, work, num_cache_blocks=blocks)
    free = outputs_of(model, work)
    assert {name: tokens_of(o) for name, o in made.items()} == {name: tokens_of(o) for name, o in free.items()}


def test_a_strong_frequency_penalty_never_repeats_a_token(model: Path) -> None:
    tokens = tokens_of(outputs_of(model, [request("a", [5, 6, 7], count=100, frequency_penalty=1000.0)])["a"])
    assert len(set(tokens)) == 100


def test_logprobs_come_with_their_tokens_and_only_where_asked_for(model: Path) -> None:
    made = outputs_of(
        model,
        [
            request("plain", [5, 6, 7], count=20),
            request("chosen", [5, 6, 7], count=20, num_logprobs=0),
            request("top", [5, 6, 7], count=20, num_logprobs=20),
        ],
    )
    assert all(o.logprobs is None for o in made["plain"])
    assert tokens_of(made["plain"]) == tokens_of(made["top"]) == tokens_of(made["chosen"])
    for chosen, top in zip(made["chosen"], made["top"], strict=True):
        assert chosen.logprobs is not None and top.logprobs is not None
        assert (chosen.logprobs[0].top_ids, len(top.logprobs[0].top_ids)) == ([], 20)
        assert top.logprobs[0].top_ids[0] == top.token_ids[0]
        assert math.isclose(chosen.logprobs[0].chosen, top.logprobs[0].top_logprobs[0], rel_tol=1e-4)
        assert 0.0 < sum(map(math.exp, top.logprobs[0].top_logprobs)) <= 1.0 + 1e-5


def test_min_new_tokens_holds_back_the_end(model: Path) -> None:
    greedy = tokens_of(outputs_of(model, [request("a", [5, 6, 7], count=40)])["a"])
    stop = greedy[3]
    made = outputs_of(model, [request("a", [5, 6, 7], count=40, stop_token_ids=(stop,), min_new_tokens=20)])["a"]
    assert len(tokens_of(made)) >= 20
    assert stop not in tokens_of(made)[:20]
    assert max(tokens_of(made)) < VOCAB
