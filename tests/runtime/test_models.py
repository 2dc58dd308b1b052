"""The engine's greedy tokens are those of transformers, for every family and variant, however the engine is set.

Prompts of 1 to 600 tokens and 64 new tokens each. GANTLINE_FULL_MATRIX=1 runs 200 of them, every setting with every configuration, and as
many on two ranks; by default 40 (every edge of a block among them), and each family with two settings, its variants with one, so that
every setting is met.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine

from tests.runtime.checkpoints import CONFIGURATIONS, VOCAB, write_checkpoint
from tests.runtime.engine_support import drain, request, tokens_of
from tests.runtime.reference import NEW_TOKENS, Reference, make_prompts

SETTINGS: dict[str, dict[str, Any]] = {
    "prefix-unlimited": {"max_prefill_token_num": 8192},
    "prefix-chunks-of-32": {"max_prefill_token_num": 32},
    "no-prefix-unlimited": {"max_prefill_token_num": 8192, "enable_prefix_caching": False},
    "no-prefix-chunks-of-32": {"max_prefill_token_num": 32, "enable_prefix_caching": False},
    "preempted": {"num_cache_blocks": 96, "max_batch_size": 32, "max_prefill_token_num": 256},
    "preempted-no-prefix": {"num_cache_blocks": 96, "max_batch_size": 32, "max_prefill_token_num": 256, "enable_prefix_caching": False},
}
MAIN = ("llama", "mistral-window", "qwen2-tied", "qwen3")
FULL = os.environ.get("GANTLINE_FULL_MATRIX") == "1"
TINY_MODEL = Path(__file__).parents[2] / "examples/tiny-model"
PROMPTS = 200 if FULL else 40
LONGEST = 600


def _pairs() -> Iterator[tuple[str, str]]:
    names = list(SETTINGS)
    for i, configuration in enumerate(CONFIGURATIONS):
        chosen = names[2 * i % 6 :: 3][:2] if configuration in MAIN else names[i % 6 : i % 6 + 1]
        for setting in names if FULL else chosen:
            yield configuration, setting


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Reference]]:
    torch.set_num_threads(1)
    made: dict[str, tuple[Path, Reference]] = {}

    class Lazy(dict[str, tuple[Path, Reference]]):
        def __missing__(self, name: str) -> tuple[Path, Reference]:
            folder = TINY_MODEL if name == "shipped" else write_checkpoint(name, tmp_path_factory.mktemp("model") / name)
            self[name] = folder, Reference(folder)
            return self[name]

    return Lazy(made)


def run(folder: Path, prompts: list[list[int]], **settings: Any) -> tuple[list[list[int]], LLMEngine]:
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 16, "max_batch_size": 64, "session_len": 704}
    defaults["num_cache_blocks"] = 2816
    engine = LLMEngine(folder, EngineConfig(**{**defaults, **settings}))
    try:
        for i, prompt in enumerate(prompts):
            engine.add_request(request(str(i), prompt, count=NEW_TOKENS))
        outputs = drain(engine, checked=False)
        engine.check_integrity()
        return [tokens_of(outputs[str(i)]) for i in range(len(prompts))], engine
    finally:
        engine.close()


@pytest.mark.parametrize(("configuration", "setting"), _pairs())
def test_greedy_tokens_equal_those_of_transformers(configuration: str, setting: str, references: dict[str, tuple[Path, Reference]]) -> None:
    folder, reference = references[configuration]
    prompts = make_prompts(PROMPTS, LONGEST, VOCAB)
    answers, engine = run(folder, prompts, **SETTINGS[setting])
    assert all(len(answer) == NEW_TOKENS for answer in answers)
    reference.verify(prompts, answers)
    stats = engine.stats()
    assert (stats.num_preemptions > 0) == setting.startswith("preempted")
    assert (stats.num_cached_tokens > 0) == ("no-prefix" not in setting)


@pytest.mark.parametrize("configuration", CONFIGURATIONS if FULL else ("llama-biases-linear-rope", *MAIN[1:]))  # the first has one KV head
def test_two_ranks_give_the_same_tokens(configuration: str, references: dict[str, tuple[Path, Reference]]) -> None:
    folder, reference = references[configuration]
    prompts = make_prompts(PROMPTS, LONGEST, VOCAB)[:: 1 if FULL else 4]
    answers, engine = run(folder, prompts, tp=2, max_prefill_token_num=512, num_cache_blocks=160)
    reference.verify(prompts, answers)
    assert engine.stats().num_generated_tokens == len(prompts) * NEW_TOKENS


SHIPPED = pytest.mark.skipif(not (TINY_MODEL / "config.json").exists(), reason="the shipped model is not there")


@SHIPPED
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_shipped_models_greedy_tokens_equal_those_of_transformers(setting: str, references: dict[str, tuple[Path, Reference]]) -> None:
    """All prompts with one setting, a quarter of them with the others, unless the full matrix is asked for."""
    folder, reference = references["shipped"]
    prompts = make_prompts(PROMPTS, LONGEST, 4000)[:: 1 if FULL or setting == "prefix-unlimited" else 4]
    blocks = {"num_cache_blocks": 44} if setting.startswith("preempted") and not FULL else {}
    answers, engine = run(folder, prompts, **{**SETTINGS[setting], **blocks})
    reference.verify(prompts, answers)
    assert (engine.stats().num_preemptions > 0) == setting.startswith("preempted")


@SHIPPED
def test_the_shipped_model_gives_the_same_tokens_on_two_ranks(references: dict[str, tuple[Path, Reference]]) -> None:
    folder, reference = references["shipped"]
    prompts = make_prompts(PROMPTS, LONGEST, 4000)[:: 1 if FULL else 4]
    answers, _ = run(folder, prompts, tp=2)
    reference.verify(prompts, answers)
