"""A step that raises ends the requests that raise by themselves, and no other; what cannot be survived ends the engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.kv_cache import CacheManager
from gantline_runtime.scheduler import Step

from tests.runtime.checkpoints import write_checkpoint
from tests.runtime.engine_support import VOCAB, FakeExecutor, drain, expected_tokens, fake_engine, request, tokens_of

POISON = 13
DEPTHS = pytest.mark.parametrize("depth", [0, 1, 2])


class PoisonedExecutor(FakeExecutor):
    """Raises where token `at` of an answer to a prompt with `POISON` is to be sampled; the device misses that step's updates."""

    at = 0
    error: Exception = RuntimeError("shapes do not fit")
    attempts = 0

    def launch(self, step: Step, cache: CacheManager, masks: Any = None) -> Any:
        for sequence, start, count in zip(step.sequences, step.starts, step.query_lens, strict=True):
            if POISON in sequence.tokens[: sequence.prompt_len] and start <= self.at + sequence.prompt_len - 1 < start + count:
                cache.take_table_updates()
                self.attempts += 1
                raise self.error
        return super().launch(step, cache, masks)


def poisoned_engine(**settings: Any) -> tuple[Any, PoisonedExecutor]:
    engine, executor = fake_engine(**settings)
    executor.__class__ = PoisonedExecutor
    assert isinstance(executor, PoisonedExecutor)
    return engine, executor


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.choice([t for t in range(VOCAB) if t != POISON]) for _ in range(rng.randint(1, 60))] for _ in range(count)]


@DEPTHS
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_poisoned_request_ends_with_its_own_error_and_the_others_go_on(depth: int, at: int) -> None:
    engine, executor = poisoned_engine(depth=depth)
    executor.at = at
    work = prompts(8)
    for i, prompt in enumerate(work):
        engine.add_request(request(str(i), prompt if i != 3 else [*prompt, POISON], count=20))
    outputs = drain(engine)
    last = outputs["3"][-1]
    assert last.finish_reason == "error" and last.error == "RuntimeError: shapes do not fit" and last.token_ids == []
    assert tokens_of(outputs["3"]) == expected_tokens([*work[3], POISON], at)
    for i, prompt in enumerate(work):
        if i != 3:
            assert tokens_of(outputs[str(i)]) == expected_tokens(prompt, 20), i
    assert engine.stats().cache_usage == 0 and engine.stats().num_running == 0
    assert executor.attempts <= 2 * 8, "halving finds the one of eight in few steps"


@DEPTHS
def test_what_a_failed_request_never_wrote_is_found_by_nobody(depth: int) -> None:
    """Its neighbour of the same step shares blocks that it was to write, and so does who comes later."""
    engine, _ = poisoned_engine(depth=depth, max_prefill_token_num=256)
    shared = list(range(100, 164))
    engine.add_request(request("poison", [*shared, POISON], count=8))
    engine.add_request(request("neighbour", [*shared, 1, 2], count=8))
    engine.add_request(request("stranger", [5, 6, 7], count=8))
    outputs = drain(engine)
    assert outputs["poison"][-1].finish_reason == "error"
    assert tokens_of(outputs["neighbour"]) == expected_tokens([*shared, 1, 2], 8)
    assert tokens_of(outputs["stranger"]) == expected_tokens([5, 6, 7], 8)
    engine.add_request(request("later", [*shared, 3], count=8))
    assert tokens_of(drain(engine)["later"]) == expected_tokens([*shared, 3], 8)


@DEPTHS
@pytest.mark.parametrize("beginning", [64, 0])
def test_who_was_admitted_beside_a_failed_step_without_a_part_in_it_is_told_of_it(depth: int, beginning: int) -> None:
    """It holds blocks that the step was to write, and what it was given itself travelled with that step."""
    engine, _ = poisoned_engine(depth=depth, max_prefill_token_num=256)
    shared = list(range(100, 164))
    engine.add_request(request("stranger", [5, 6, 7], count=30))
    while not engine.stats().num_generated_tokens:
        engine.step()
    chunk = engine.pacer.chunk
    engine.pacer.chunk = lambda load, start, wanted: 0 if load.prompt_tokens and wanted < 100 else chunk(load, start, wanted)
    engine.add_request(request("poison", [*shared, POISON], count=8))
    neighbour = [*shared[:beginning], *range(200, 236)]
    engine.add_request(request("neighbour", neighbour, count=8))
    outputs = drain(engine)
    assert outputs["poison"][-1].finish_reason == "error"
    assert tokens_of(outputs["neighbour"]) == expected_tokens(neighbour, 8)
    assert len(tokens_of(outputs["stranger"])) > 20 and engine.stats().cache_usage == 0


@DEPTHS
@pytest.mark.parametrize("wanted", [{"num_prompt_logprobs": 0}, {"pooling": "mean"}])
def test_what_is_read_of_a_neighbours_prompt_is_not_lost(depth: int, wanted: dict[str, Any]) -> None:
    """Nor read twice, where the neighbour must be computed anew because it shares blocks with the one that failed."""
    shared = list(range(100, 164))

    def outcome(*, poisoned: bool) -> list[Any]:
        engine, _ = poisoned_engine(depth=depth, max_prefill_token_num=256)
        if poisoned:
            engine.add_request(request("poison", [*shared, POISON], count=8))
        for name, prompt in (("neighbour", [*shared, 1, 2]), ("stranger", [5, 6, 7])):
            read = request(name, prompt, count=0 if "pooling" in wanted else 3)
            engine.add_request(msgspec.structs.replace(read, **wanted))
        outputs = drain(engine)
        return [
            (
                tokens_of(outputs[name]),
                [o.embedding for o in outputs[name]],
                [o.prompt_logprobs.chosen for o in outputs[name] if o.prompt_logprobs],
            )
            for name in ("neighbour", "stranger")
        ]

    assert outcome(poisoned=True) == outcome(poisoned=False)


@DEPTHS
def test_several_poisoned_requests_of_one_step_are_all_found(depth: int) -> None:
    engine, _ = poisoned_engine(depth=depth, max_prefill_token_num=512)
    work = prompts(8, seed=2)
    for i, prompt in enumerate(work):
        engine.add_request(request(str(i), [POISON, *prompt] if i % 3 == 0 else prompt, count=12))
    outputs = drain(engine)
    for i, prompt in enumerate(work):
        if i % 3 == 0:
            assert [o.finish_reason for o in outputs[str(i)]] == ["error"]
        else:
            assert tokens_of(outputs[str(i)]) == expected_tokens(prompt, 12), i


def test_a_request_that_is_alone_and_fails_leaves_an_engine_that_works() -> None:
    engine, _ = poisoned_engine(depth=1)
    for _ in range(3):
        engine.add_request(request("a", [POISON], count=4))
        assert drain(engine)["a"][-1].finish_reason == "error"
    engine.add_request(request("b", [1], count=4))
    assert tokens_of(drain(engine)["b"]) == expected_tokens([1], 4)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered"), RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")],
)
def test_a_gpu_in_error_ends_the_engine_at_once(error: Exception) -> None:
    engine, executor = poisoned_engine(depth=1)
    executor.error = error
    engine.add_request(request("a", [POISON]))
    engine.add_request(request("b", [1]))
    with pytest.raises(RuntimeError) as raised:
        drain(engine)
    assert raised.value is error and executor.attempts == 1


def test_running_out_of_gpu_memory_concerns_the_requests_of_the_step_alone() -> None:
    engine, executor = poisoned_engine(depth=1)
    executor.error = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    engine.add_request(request("a", [POISON]))
    engine.add_request(request("b", [1], count=4))
    outputs = drain(engine)
    assert "CUDA out of memory" in outputs["a"][-1].error and tokens_of(outputs["b"]) == expected_tokens([1], 4)


def test_where_every_request_fails_the_engine_is_at_fault() -> None:
    engine, executor = poisoned_engine(depth=1)
    for i in range(4):
        engine.add_request(request(str(i), [POISON, i]))
    with pytest.raises(RuntimeError, match="shapes"):
        drain(engine)
    engine, executor = poisoned_engine(depth=1)
    with pytest.raises(RuntimeError, match="shapes"):
        for i in range(20):
            engine.add_request(request(str(i), [POISON]))
            drain(engine)
    assert executor.attempts > 16


@pytest.mark.parametrize("late", [False, True])
def test_with_a_real_model_the_others_get_the_tokens_that_they_would_have_got(tmp_path: Path, late: bool) -> None:
    """Sampled, penalized and greedy ones; the step fails before it began, or when all of it had been computed and counted."""
    model = write_checkpoint("llama", tmp_path / "model")
    config = EngineConfig(device="cpu", block_size=16, num_cache_blocks=64, session_len=256, max_batch_size=8)

    def answers(*, poisoned: bool) -> dict[str, list[int]]:
        engine = LLMEngine(model, config)
        launch = engine._executor.launch

        def failing(step: Step, cache: CacheManager, masks: Any = None) -> Any:
            pending = launch(step, cache, masks) if late else None
            if any(s.request_id == "poison" and s.num_generated == 3 for s in step.sequences):
                raise RuntimeError("shapes do not fit")
            return pending if late else launch(step, cache, masks)

        engine._executor.launch = failing  # type: ignore[method-assign]
        kinds: list[dict[str, Any]] = [
            {},
            {"temperature": 0.9, "top_p": 0.9, "seed": 4},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.7},
            {"temperature": 1.0, "presence_penalty": 1.5, "seed": 9},
        ]
        for i, sampling in enumerate(kinds):
            engine.add_request(request(str(i), [20 + i, 30, 40, 50 + i], count=16, **sampling))
        if poisoned:
            engine.add_request(request("poison", [9, 8, 7], count=16))
        outputs = drain(engine)
        engine.close()
        if poisoned:
            assert outputs.pop("poison")[-1].finish_reason == "error"
        return {name: tokens_of(parts) for name, parts in outputs.items()}

    assert answers(poisoned=True) == answers(poisoned=False)
