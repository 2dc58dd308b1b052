"""The scheduler, through the engine's loop, on a model that costs nothing: no weights, no torch."""

from __future__ import annotations

import random

import msgspec
import pytest
from gantline_runtime.engine_loop import EngineLoop
from gantline_runtime.kv_cache import prefix_groups
from gantline_runtime.request import QueueFull, RequestRejected

from tests.runtime.engine_support import EOS, VOCAB, drain, expected_tokens, fake_engine, request, tokens_of

DEPTHS = pytest.mark.parametrize("depth", [0, 1, 2])


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_idle(engine: EngineLoop) -> None:
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.cache_usage) == (0, 0, 0.0)
    assert not engine.has_work()


@DEPTHS
@pytest.mark.parametrize("chunk", [8, 13, 64, 1024])
def test_every_request_gets_the_tokens_that_it_would_get_alone(depth: int, chunk: int) -> None:
    engine, _ = fake_engine(depth=depth, max_prefill_token_num=chunk)
    work = prompts(40, 120)
    for i, prompt in enumerate(work):
        engine.add_request(request(str(i), prompt, count=1 + i % 33))
    outputs = drain(engine)
    for i, prompt in enumerate(work):
        assert tokens_of(outputs[str(i)]) == expected_tokens(prompt, 1 + i % 33), i
        assert [o.finish_reason for o in outputs[str(i)]] == [None] * (i % 33) + ["length"]
    assert_idle(engine)


@DEPTHS
def test_padding_batches_to_classes_changes_nobodys_tokens(depth: int) -> None:
    engine, executor = fake_engine(depth=depth, padded=True, max_batch_size=7)
    work = prompts(20, 100)
    for i, prompt in enumerate(work):
        engine.add_request(request(str(i), prompt, count=5 + 3 * i))
    outputs = drain(engine)
    assert any(step.num_decodes == step.num_tokens == 5 for step in executor.steps), "no class has five"
    assert any(0 < step.num_decodes < step.num_tokens < 32 for step in executor.steps), "no mixed class is so small"
    for i, prompt in enumerate(work):
        assert tokens_of(outputs[str(i)]) == expected_tokens(prompt, 5 + 3 * i), i


@DEPTHS
@pytest.mark.parametrize("prefix", [True, False])
def test_a_cache_too_small_for_all_preempts_and_still_gives_the_same_tokens(depth: int, prefix: bool) -> None:
    engine, _ = fake_engine(depth=depth, num_cache_blocks=16, enable_prefix_caching=prefix)
    work = prompts(30, 60)
    for i, prompt in enumerate(work):
        engine.add_request(request(str(i), prompt, count=100))
    outputs = drain(engine)
    assert engine.stats().num_preemptions > 0
    for i, prompt in enumerate(work):
        assert tokens_of(outputs[str(i)]) == expected_tokens(prompt, 100), i
    assert_idle(engine)


@DEPTHS
def test_tokens_after_a_stop_token_are_neither_sent_nor_counted_nor_cached(depth: int) -> None:
    engine, executor = fake_engine(depth=depth)
    prompt = next(p for p in prompts(5000, 20, seed=3) if EOS in expected_tokens(p, 40)[18:30])
    expected = expected_tokens(prompt, 200, stop=frozenset({EOS}))
    engine.add_request(request("a", prompt, count=200, ignore_eos=False))
    outputs = drain(engine)["a"]
    assert tokens_of(outputs) == expected
    assert outputs[-1].finish_reason == "stop"
    assert engine.stats().num_generated_tokens == len(expected)
    assert sum(len(step.samples) for step in executor.steps) == len(expected) + depth, "surplus tokens were computed, as overlap must"
    known = engine._cache.prefix._entry_of.values()
    sequence = prompt + expected
    blocks = {tuple(sequence[i : i + 16]) for i in range(0, len(sequence), 16)}
    assert {tuple(content) for _, content in known} <= blocks
    assert_idle(engine)


@DEPTHS
def test_a_stop_token_counts_only_after_min_new_tokens(depth: int) -> None:
    engine, _ = fake_engine(depth=depth)
    prompt = next(p for p in prompts(5000, 20) if EOS in expected_tokens(p, 5))
    at = expected_tokens(prompt, 5).index(EOS)
    engine.add_request(request("a", prompt, count=50, ignore_eos=False, min_new_tokens=at + 1))
    engine.add_request(request("b", prompt, count=50, ignore_eos=False, min_new_tokens=at))
    outputs = drain(engine)
    assert len(tokens_of(outputs["b"])) == at + 1
    assert tokens_of(outputs["a"]) == expected_tokens(prompt, 50, stop=frozenset({EOS}), min_tokens=at + 1)


@DEPTHS
def test_stop_token_ids_end_a_request_even_if_the_models_own_are_ignored(depth: int) -> None:
    engine, _ = fake_engine(depth=depth)
    prompt = [5, 6, 7]
    stop = expected_tokens(prompt, 9)[8]
    engine.add_request(request("a", prompt, count=50, stop_token_ids=(stop,)))
    outputs = drain(engine)["a"]
    assert tokens_of(outputs) == expected_tokens(prompt, 50, stop=frozenset({stop}))
    assert outputs[-1].finish_reason == "stop"


@DEPTHS
def test_a_shared_beginning_is_computed_once_even_by_requests_of_one_step(depth: int) -> None:
    engine, executor = fake_engine(depth=depth, max_prefill_token_num=256)
    shared = list(range(100, 164))
    for i in range(4):
        engine.add_request(request(str(i), [*shared, i, i + 1], count=8))
    outputs = drain(engine)
    first = executor.steps[0]
    assert first.query_lens == [66, 2, 2, 2], "the later three find the first one's blocks, which the same step writes"
    for i in range(4):
        assert tokens_of(outputs[str(i)]) == expected_tokens([*shared, i, i + 1], 8)
        assert outputs[str(i)][0].num_cached_tokens == (64 if i else 0)
    assert engine.stats().num_cached_tokens == 3 * 64


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    engine, _ = fake_engine(depth=1)
    prompt = list(range(40))
    engine.add_request(request("a", prompt, count=40))
    answer = tokens_of(drain(engine)["a"])
    engine.add_request(request("b", [*prompt, *answer, 1, 2, 3], count=4))
    outputs = drain(engine)["b"]
    assert outputs[0].num_cached_tokens == 64, "79 tokens have keys and values: four full blocks"
    assert tokens_of(outputs) == expected_tokens([*prompt, *answer, 1, 2, 3], 4)


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    engine, _ = fake_engine()
    for name in ("a", "b"):
        engine.add_request(request(name, list(range(32)), count=3))
        outputs = drain(engine)[name]
        assert tokens_of(outputs) == expected_tokens(list(range(32)), 3)
    assert outputs[0].num_cached_tokens == 16


def test_without_prefix_caching_nothing_is_shared() -> None:
    engine, _ = fake_engine(enable_prefix_caching=False)
    for _ in range(2):
        engine.add_request(request("a", list(range(32)), count=3))
        assert drain(engine)["a"][0].num_cached_tokens == 0


@DEPTHS
def test_decoding_requests_go_first_and_chunks_fill_the_rest(depth: int) -> None:
    engine, executor = fake_engine(depth=depth, max_prefill_token_num=32)
    engine.add_request(request("short", [1, 2, 3], count=30))
    engine.step()
    engine.step()
    engine.add_request(request("long", list(range(200)), count=5))
    drain(engine)
    mixed = [step for step in executor.steps if step.num_decodes and len(step.sequences) > step.num_decodes]
    assert len(mixed) >= 6
    assert all(step.sequences[0].request_id == "short" and step.num_tokens <= 32 for step in mixed)
    assert [step.query_lens[1] for step in mixed[:6]] == [31] * 6


@DEPTHS
def test_the_queue_is_bounded(depth: int) -> None:
    engine, _ = fake_engine(depth=depth, max_batch_size=2, max_waiting=3)
    for i in range(5):
        engine.add_request(request(str(i), [1, 2, 3], count=10))
    with pytest.raises(QueueFull):
        engine.add_request(request("too many", [1, 2, 3]))
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (2, 3)
    with pytest.raises(QueueFull):
        engine.add_request(request("too many", [1, 2, 3]))
    assert len(drain(engine)) == 5


@pytest.mark.parametrize(
    ("prompt", "sampling", "cause"),
    [
        ([], {}, "empty"),
        (list(range(256)), {}, "256 tokens"),
        ([VOCAB], {}, "outside"),
        ([-1], {}, "outside"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_request_that_can_never_run_is_rejected_with_its_cause(prompt: list[int], sampling: dict[str, object], cause: str) -> None:
    engine, _ = fake_engine()
    with pytest.raises(RequestRejected, match=cause):
        engine.add_request(request("a", prompt, **sampling))
    assert_idle(engine)


def test_an_identifier_in_use_is_rejected() -> None:
    engine, _ = fake_engine()
    engine.add_request(request("a", [1]))
    with pytest.raises(RequestRejected, match="'a'"):
        engine.add_request(request("a", [2]))
    drain(engine)
    engine.add_request(request("a", [2]))
    drain(engine)


def test_the_output_is_cut_to_what_the_session_leaves() -> None:
    engine, _ = fake_engine()
    engine.add_request(request("a", [3] * 250, count=100))
    outputs = drain(engine)["a"]
    assert len(tokens_of(outputs)) == 6
    assert outputs[-1].finish_reason == "length"


@DEPTHS
@pytest.mark.parametrize("steps_before", range(6))
def test_an_aborted_request_frees_its_blocks_when_its_step_is_over_and_sends_nothing_more(depth: int, steps_before: int) -> None:
    engine, executor = fake_engine(depth=depth, max_prefill_token_num=32)
    engine.add_request(request("gone", list(range(100)), count=50))
    engine.add_request(request("stays", [9, 9, 9], count=20))
    seen = [output for _ in range(steps_before) for output in engine.step()]
    assert engine.abort("gone")
    launched = len(executor.steps)
    assert not engine.abort("gone")
    engine.check_integrity()
    for _ in range(depth + 1):
        seen += (after := engine.step())
        engine.check_integrity()
        assert all(output.request_id != "gone" for output in after)
    assert not any(s.request_id == "gone" for step in executor.steps[launched:] for s in step.sequences), "no step has it any more"
    assert not any(s.request_id == "gone" for s in (*engine._scheduler.leaving, *engine._scheduler.decoding, *engine._scheduler.prefilling))
    seen += [output for outputs in drain(engine).values() for output in outputs]
    assert tokens_of([o for o in seen if o.request_id == "stays"]) == expected_tokens([9, 9, 9], 20)
    assert_idle(engine)


@DEPTHS
@pytest.mark.parametrize("counted", [0, 11, 12, 13, 28, 59])
def test_tokens_after_the_end_that_the_client_s_side_found_are_not_cached(depth: int, counted: int) -> None:
    """A stop string is found some steps late: by then blocks of what came after it may be full, or findable."""
    engine, _ = fake_engine(depth=depth)
    prompt = list(range(100, 120))
    engine.add_request(request("a", prompt, count=200))
    known: list[int] = []
    while len(known) < 60:
        known += [token for output in engine.step() for token in output.token_ids]
    assert engine.abort("a", counted)
    engine.check_integrity()
    drain(engine)
    engine.add_request(request("again", prompt + expected_tokens(prompt, 60) + [1], count=5))
    outputs = drain(engine)["again"]
    assert outputs[0].num_cached_tokens == (20 + counted) // 16 * 16
    assert tokens_of(outputs) == expected_tokens(prompt + known + [1], 5)
    assert_idle(engine)


def test_blocks_of_a_finished_request_stay_until_no_step_in_flight_can_write_them() -> None:
    engine, _ = fake_engine(depth=1)
    prompt = [5, 6, 7]
    stop = expected_tokens(prompt, 3)[2]
    engine.add_request(request("a", prompt, count=50, stop_token_ids=(stop,)))
    outputs = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs += engine.step()
    assert engine.stats().cache_usage > 0.0, "the surplus step is in flight and writes to the block"
    engine.step()
    assert_idle(engine)


def test_the_victim_of_a_preemption_is_the_cheapest_to_compute_again_and_never_the_oldest() -> None:
    engine, _ = fake_engine(depth=0, num_cache_blocks=16, block_size=16, max_prefill_token_num=256)
    engine.add_request(request("oldest", [1] * 15, count=100))
    engine.add_request(request("long", list(range(1, 101)), count=60))
    engine.add_request(request("short", [3] * 30, count=60))
    drained: list[str] = []
    while not engine.stats().num_preemptions:
        for output in engine.step():
            drained.append(output.request_id)
        engine.check_integrity()
    assert [s.request_id for s in engine._scheduler.waiting] == ["short"]
    drain(engine)
    assert_idle(engine)


def _told(told: set[int], engine: EngineLoop) -> set[int]:
    """Beginnings of prompts that the cache holds, as one knows who is told of changes."""
    added, removed = engine.take_prefix_changes()
    assert not told & set(added) and told >= set(removed)
    return (told | set(added)) - set(removed)


@pytest.mark.parametrize("seed", range(12))
def test_random_arrivals_and_cancellations_end_with_every_block_free(seed: int) -> None:
    rng = random.Random(seed)
    engine, executor = fake_engine(
        depth=seed % 3,
        num_cache_blocks=rng.choice([16, 24, 64]),
        max_batch_size=rng.choice([1, 3, 8]),
        max_prefill_token_num=rng.choice([8, 32, 128]),
        max_waiting=6,
        enable_prefix_caching=seed % 4 != 0,
    )
    shared = [rng.randrange(VOCAB) for _ in range(80)]
    alive: dict[str, tuple[list[int], int]] = {}
    seen: dict[str, list[int]] = {}
    finished: set[str] = set()
    told: set[int] = set()
    for tick in range(400):
        if rng.random() < 0.3:
            prompt = shared[: rng.randint(0, 80)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))]
            count = rng.randint(1, 256 - len(prompt))
            try:
                asked = request(str(tick), prompt, count=count, ignore_eos=False, stop_token_ids=(rng.randrange(VOCAB),))
                marks = [(place, hash(tuple(prompt[:place]))) for place in range(5, len(prompt), 9)]
                engine.add_request(msgspec.structs.replace(asked, prefix_marks=marks))
                alive[str(tick)] = (prompt, count)
            except QueueFull:
                pass
        if alive and rng.random() < 0.03:
            name = rng.choice(list(alive))
            assert engine.abort(name) == (name not in finished)
            alive.pop(name)
        for output in engine.step():
            assert output.request_id in alive, "a request that was aborted is heard of again"
            seen.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason:
                finished.add(output.request_id)
                alive_prompt, count = alive.pop(output.request_id)
                got = seen[output.request_id]
                assert got == expected_tokens(alive_prompt, len(got)), output.request_id
                assert output.finish_reason == "stop" or len(got) == min(count, 256 - len(alive_prompt))
        engine.check_integrity()
        if tick % 7 == 0:
            told = _told(told, engine)
            assert told == set(engine.prefix_marks())
    for name in list(alive):
        engine.abort(name)
    drain(engine)
    assert_idle(engine)
    assert bool(told) == (seed % 4 != 0)
    engine.reset_prefix_cache()
    assert not _told(told, engine) and not engine.prefix_marks()
    assert len(finished) >= 3
    assert executor.depth == seed % 3


@DEPTHS
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("blocks", [18, 200])
def test_requests_that_share_a_prefix_are_attended_as_a_group_and_get_the_tokens_they_would_alone(
    depth: int, padded: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes of several lengths, one inside another, beside requests that share nothing; a small cache preempts."""
    monkeypatch.setattr(prefix_groups, "LEAST_SAVING", 1)
    engine, executor = fake_engine(depth=depth, padded=padded, num_cache_blocks=blocks)
    beginnings = [list(range(100, 100 + length)) for length in (64, 32, 16, 0)]
    work = [beginnings[i % 4] + tail for i, tail in enumerate(prompts(40, 30))]
    for i, prompt in enumerate(work):
        engine.add_request(request(str(i), prompt, count=20 + 2 * i))
    outputs = drain(engine)
    for i, prompt in enumerate(work):
        assert tokens_of(outputs[str(i)]) == expected_tokens(prompt, 20 + 2 * i), i
    assert executor.num_grouped > 100
    assert bool(engine.stats().num_preemptions) == (blocks == 18)
    assert_idle(engine)
