"""The engine's loop with grammars: real xgrammar, a model that costs nothing and proposes tokens at random."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import EngineLoop, LLMEngine
from gantline_runtime.grammar import compiler as grammar_compiler
from gantline_runtime.grammar import matching
from gantline_runtime.grammar.compiler import GrammarCompiler, InvalidGrammar
from gantline_runtime.grammar.requests import Grammars
from gantline_runtime.messages import EngineRequest, SamplingParams, TokenOutput
from gantline_runtime.server.structured import Constraint, json_format
from gantline_runtime.tokenizer import Tokenizer
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from tests.runtime.engine_support import VOCAB, FakeExecutor, drain, expected_tokens, request, tokens_of
from tests.runtime.server_fakes import write_model

TINY = Path(__file__).parents[2] / "examples" / "tiny-model"
EOS = 257
"""`<|end|>` of the byte tokenizer."""


def regex(pattern: str) -> str:
    return json.dumps({"type": "structural_tag", "format": {"type": "regex", "pattern": pattern}})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("grammar") / "bytes")


@pytest.fixture(scope="module")
def grammars(model: Path) -> Iterator[Grammars]:
    """Shared by the module's engines, so that the compiler starts once."""
    grammars = Grammars(model, vocab_size=VOCAB, eos_token_ids=(EOS,), max_rows=9, pinned=False)
    yield grammars
    grammars.close()


def make_engine(grammars: Grammars, *, depth: int = 1, **settings: Any) -> tuple[EngineLoop, FakeExecutor]:
    defaults = {"session_len": 256, "num_cache_blocks": 64, "block_size": 16, "max_batch_size": 8, "max_prefill_token_num": 64}
    executor = FakeExecutor(EngineConfig(**{**defaults, **settings}), depth=depth)
    return EngineLoop(executor, vocab_size=VOCAB, eos_token_ids=(EOS,), grammars=grammars), executor


def constrained(name: str, grammar: str, count: int = 100, prompt: int = 1, **sampling: Any) -> EngineRequest:
    params = SamplingParams(max_new_tokens=count, temperature=0.0, **sampling)
    return EngineRequest(request_id=name, prompt_ids=[prompt, 2, 3], sampling=params, grammar=grammar)


def text_of(model: Path, outputs: list[TokenOutput]) -> str:
    return Tokenizer.load(model).decode([token for token in tokens_of(outputs) if token != EOS])


@pytest.mark.parametrize("depth", [0, 1])
def test_answers_match_their_grammars_beside_free_ones_whatever_is_preempted_or_aborted(
    model: Path, grammars: Grammars, depth: int
) -> None:
    patterns = [r"[a-z]{3,40}(x|yy)", r"(ab|cd)*!", r"-?[0-9]{1,30}(\.[0-9]{2})?", r"é{2,9}世?"]
    preemptions = 0
    for seed in range(12):
        rng = random.Random(seed)
        engine, _ = make_engine(grammars, depth=depth, num_cache_blocks=rng.choice([10, 16, 64]), session_len=128)
        free = {f"free-{i}": [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for i in range(4)}
        bound = {f"bound-{i}": rng.choice(patterns) for i in range(6)}
        requests = [request(name, prompt, 40) for name, prompt in free.items()]
        requests += [constrained(name, regex(pattern), prompt=rng.randrange(VOCAB)) for name, pattern in bound.items()]
        rng.shuffle(requests)
        outputs: dict[str, list[TokenOutput]] = {}
        aborted = set(rng.sample(sorted(bound), 2))
        while requests or engine.has_work():
            if requests and rng.random() < 0.3:
                engine.add_request(requests.pop())
            if rng.random() < 0.02 and (leaving := aborted - {r.request_id for r in requests}):
                engine.abort(min(leaving))
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
            engine.check_integrity()
        preemptions += engine.stats().num_preemptions
        for name, prompt in free.items():
            assert tokens_of(outputs[name]) == expected_tokens(prompt, 40)
        for name, pattern in bound.items():
            last = outputs[name][-1] if name in outputs else None
            if last is None or last.finish_reason is None:
                assert name in aborted
            elif last.finish_reason == "stop":
                assert tokens_of(outputs[name])[-1] == EOS and re.fullmatch(pattern, text_of(model, outputs[name]))
            else:
                assert last.finish_reason == "length" and len(tokens_of(outputs[name])) == 100
    assert preemptions > 0


def test_only_sampling_waits_for_a_mask(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a grammar the next forward pass is launched before the last step's tokens are read; without one, its sampling too."""
    engine, executor = make_engine(grammars)
    events: list[str] = []
    launch, read = executor.launch, executor.read

    def observed_launch(step: Any, cache: Any, masks: Any = None) -> Any:
        def observed_masks() -> Any:
            mask = masks()
            events.append("mask")
            return mask

        events.append("forward")
        pending = launch(step, cache, observed_masks if masks is not None else None)
        events.append("sample")
        return pending

    monkeypatch.setattr(executor, "launch", observed_launch)
    monkeypatch.setattr(executor, "read", lambda pending: (events.append("read"), read(pending))[1])
    engine.add_request(constrained("a", regex("[ab]{4}")))
    drain(engine)
    assert events[:3] == ["forward", "mask", "sample"]
    assert events[3:7] == ["forward", "read", "mask", "sample"]
    events.clear()
    engine.add_request(request("b", [1, 2], 3))
    drain(engine)
    assert events[:5] == ["forward", "sample", "forward", "sample", "read"]


def test_a_token_sampled_past_the_end_moves_no_matcher(grammars: Grammars) -> None:
    """A grammar that ends at once, again and again: what the overlapped step samples after the end is dropped."""
    engine, _ = make_engine(grammars)
    for i in range(20):
        engine.add_request(constrained(f"r{i}", regex("[ab]"), prompt=i))
    outputs = drain(engine)
    assert all(len(tokens_of(parts)) == 2 and parts[-1].finish_reason == "stop" for parts in outputs.values()) and len(outputs) == 20


def test_the_grammars_end_is_the_answers_even_if_end_tokens_are_ignored(grammars: Grammars) -> None:
    engine, _ = make_engine(grammars)
    engine.add_request(constrained("a", regex("[ab]{3}"), ignore_eos=True))
    parts = drain(engine)["a"]
    assert parts[-1].finish_reason == "stop" and len(tokens_of(parts)) == 4


def test_a_model_without_end_tokens_ends_with_its_grammar(model: Path) -> None:
    grammars = Grammars(model, vocab_size=VOCAB, eos_token_ids=(), max_rows=9, pinned=False)
    engine, _ = make_engine(grammars)
    engine.eos_token_ids = ()
    engine.add_request(constrained("a", regex("[ab]{3}")))
    parts = drain(engine)["a"]
    engine.close()
    assert parts[-1].finish_reason == "stop" and len(tokens_of(parts)) == 3


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone(grammars: Grammars) -> None:
    engine, _ = make_engine(grammars)
    engine.add_request(constrained("bad", regex("[a-")))
    engine.add_request(request("good", [1, 2], 5))
    outputs = drain(engine)
    assert (outputs["bad"][-1].finish_reason, outputs["bad"][-1].error_code) == ("error", "invalid_grammar") and outputs["bad"][-1].error
    assert tokens_of(outputs["good"]) == expected_tokens([1, 2], 5)


def test_a_request_whose_grammar_cannot_even_be_queued_leaves_nothing(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(grammars)

    def no_thread(grammar: str) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(grammars._compiler, "submit", no_thread)
    with pytest.raises(RuntimeError, match="new thread"):
        engine.add_request(constrained("a", regex("[ab]{3}")))
    assert not engine.has_work() and engine.stats().num_waiting == 0
    engine.add_request(request("a", [1, 2], 3))
    assert len(tokens_of(drain(engine)["a"])) == 3


def test_requests_that_need_no_compilation_overtake_one_that_does(model: Path) -> None:
    grammars = Grammars(model, vocab_size=VOCAB, eos_token_ids=(EOS,), max_rows=9, pinned=False)  # its compiler is not started yet
    engine, _ = make_engine(grammars)
    engine.add_request(constrained("first", regex("[ab]{3}")))
    engine.add_request(request("second", [1, 2], 5))
    order = []
    while engine.has_work():
        order += [output.request_id for output in engine.step() if output.finish_reason is not None]
    engine.close()
    assert order == ["second", "first"]


def test_a_request_that_left_while_its_grammar_was_compiled_leaves_nothing(model: Path) -> None:
    grammars = Grammars(model, vocab_size=VOCAB, eos_token_ids=(EOS,), max_rows=9, pinned=False)
    engine, _ = make_engine(grammars)
    engine.add_request(constrained("a", regex("[ab]{3}")))
    engine.step()
    assert engine.abort("a") and not engine.has_work() and grammars.num_compiling == 0
    engine.check_integrity()
    engine.close()


SLOW = "((a?a?a?){1,40}){1,40}b"
"""Ways to read it multiply with every letter."""


def test_a_grammar_that_becomes_slow_to_follow_ends_its_request_alone(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "LIMIT_S", 0.02)
    engine, _ = make_engine(grammars)
    engine.add_request(constrained("slow", regex("x{40}" + SLOW.replace("a", "[ac-z]")), count=200))
    for i in range(3):
        engine.add_request(constrained(f"quick-{i}", regex("[ab]{60}")))
    engine.add_request(request("free", [1, 2], 80))
    outputs = drain(engine)
    assert (outputs["slow"][-1].error_code, "too long" in outputs["slow"][-1].error) == ("invalid_grammar", True)
    assert all(outputs[f"quick-{i}"][-1].finish_reason == "stop" for i in range(3))
    assert tokens_of(outputs["free"]) == expected_tokens([1, 2], 80)


@pytest.mark.skipif(not (TINY / "model.safetensors").exists(), reason="the tiny model is not here")
def test_two_ranks_follow_a_grammar_that_only_the_first_knows() -> None:
    engine = LLMEngine(TINY, EngineConfig(device="cpu", tp=2, num_cache_blocks=32, session_len=512))
    try:
        engine.add_request(constrained("a", regex("[a-f]{8}[0-9]{4}")))
        engine.add_request(request("b", [1, 2, 3], 12))
        outputs = drain(engine)
    finally:
        engine.close()
    assert re.fullmatch("[a-f]{8}[0-9]{4}", Tokenizer.load(TINY).decode(tokens_of(outputs["a"])[:-1]))
    assert len(tokens_of(outputs["b"])) == 12


# ---- the compiler


def test_a_grammar_that_is_slow_to_follow_is_refused_before_it_runs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(model, vocab_size=VOCAB, stop_token_ids=[EOS], num_workers=1)
    with pytest.raises(InvalidGrammar, match="takes too long"):
        compiler.submit(regex(SLOW)).result(60)
    compiler.close()


def test_the_same_text_is_compiled_once_and_the_kept_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "CACHE_ENTRIES", 2)
    compiler = GrammarCompiler(model, vocab_size=VOCAB, stop_token_ids=[EOS], num_workers=1)
    texts = [regex(f"[ab]{{{n}}}") for n in (1, 2, 3)]
    futures = [compiler.submit(text) for text in (texts[0], texts[0], texts[1], texts[2])]
    assert futures[0] is futures[1] and compiler.num_compilations == 3
    for text, future in zip((texts[0], texts[0], texts[1], texts[2]), futures, strict=True):
        future.result(60)
        compiler.release(text)
    assert compiler.submit(texts[2]) is futures[3] and compiler.num_compilations == 3
    assert compiler.submit(texts[0]) is not futures[0] and compiler.num_compilations == 4
    compiler.close()


def nested_arrays(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return json.dumps({"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}})


def test_a_grammar_that_takes_too_long_is_given_up_and_the_next_one_compiles(model: Path) -> None:
    compiler = GrammarCompiler(model, vocab_size=VOCAB, stop_token_ids=[EOS], num_workers=1, limit_s=2.0)
    compiler.submit(regex("a")).result(60)
    began = time.monotonic()
    future = compiler.submit(nested_arrays(400))  # minutes
    with pytest.raises(InvalidGrammar, match="longer than 2 s"):
        future.result(60)
    assert time.monotonic() - began < 20
    compiler.submit(regex("b")).result(60)
    compiler.close()


def test_every_token_of_a_mask_is_accepted_also_those_that_begin_a_character_after_another(tmp_path: Path) -> None:
    """xgrammar's mask of an integer holds '-' with half a character behind it, and then refuses that."""
    write_model(tmp_path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=False)
    half = "à"  # stands for byte 0xE0, which three bytes of a character begin with
    vocabulary = {text: i for i, text in enumerate([*letters, f"-{half}", f"1{half}", "-1", "12"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_of, decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    compiler = GrammarCompiler(tmp_path, vocab_size=len(vocabulary), stop_token_ids=(), num_workers=1)
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 5}
    matcher = matching.GrammarMatcher(compiler.submit(Constraint(json_format(schema), "").grammar).result(), (), len(vocabulary))
    native, tried = matcher._native, set()
    for text in "[-1,12,":
        matcher.push(vocabulary[text])
        matcher.advance()
        bits = np.unpackbits(matcher.allowed.numpy().view(np.uint8), bitorder="little")[: len(vocabulary)]
        for token in np.flatnonzero(bits).tolist():
            assert native.accept_token(token, False), (text, list(vocabulary)[token])
            native.rollback(1)
            tried.add(token)
    assert {vocabulary["-"], vocabulary["-1"], vocabulary["12"]} <= tried
    compiler.close()
