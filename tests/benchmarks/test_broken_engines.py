"""The check that belongs to every figure refuses what a broken engine generates, fault by fault, and takes what ours does.

A small random model on the CPU in bf16. (All positions moved by the same are no fault: rotations know differences alone.)
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gantline_kernels import api
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine

from benchmarks.checks import Sample, check
from benchmarks.throughput import run_once
from tests.runtime.checkpoints import VOCAB, write_checkpoint

_SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
_BLOCK_SIZE = 16
_RNG = random.Random(0)
REQUESTS = [([_RNG.randrange(VOCAB) for _ in range(length)], 120) for length in (230, 17, 64, 100)]
"""So many tokens that the largest gap among them is no matter of chance: with 40 what processors round otherwise decided it."""
Call = dict[str, Any]
_ATTENTION = ("q", "key_cache", "value_cache", "block_tables", "query_starts", "context_lens", "scale")
_ROPE = ("q", "k", "v", "cos_sin", "positions", "key_cache", "value_cache", "slots")


def _with(operation: str, names: tuple[str, ...], change: Callable[[Call], Call]) -> AbstractContextManager[Any]:
    """Within it, the engine's calls of `operation` are those that `change` makes of them."""
    real = getattr(api, operation)

    def call(*arguments: Any, **options: Any) -> Any:
        return real(**change({**dict(zip(names, arguments, strict=True)), **options}))

    return patch.object(api, operation, call)


def _a_block_for_another(call: Call) -> Call:
    tables = call["block_tables"].clone()
    tables[:, 1] = torch.where(call["context_lens"] > 2 * _BLOCK_SIZE, tables[:, 0], tables[:, 1])
    return call | {"block_tables": tables}


def _a_window_that_hides_the_first_tokens(call: Call) -> Call:
    return call | {"sliding_window": 128}


def _decodes_that_miss_themselves(call: Call) -> Call:
    lens, decodes = call["context_lens"].clone(), call["num_decodes"]
    lens[:decodes] = (lens[:decodes] - 1).clamp(min=1)
    return call | {"context_lens": lens}


def _prompts_that_see_nothing_but_their_chunk(call: Call) -> Call:
    """Of each prompt the first half of its context is hidden from it."""
    return call if call["num_decodes"] else call | {"sliding_window": max(1, call["max_context_len"] // 2)}


def _decodes_one_place_late(call: Call) -> Call:
    positions = call["positions"]
    return call | {"positions": positions + 1} if len(positions) <= len(REQUESTS) else call


def _the_last_slot_of_each_block_not_written(call: Call) -> Call:
    return call | {"slots": torch.where(call["slots"] % _BLOCK_SIZE == _BLOCK_SIZE - 1, -1, call["slots"])}


def _heads_of_others(call: Call) -> Call:
    return call | {"q": call["q"].flip(1)}


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a block for another": lambda: _with("paged_attention", _ATTENTION, _a_block_for_another),
    "a window where there is none": lambda: _with("paged_attention", _ATTENTION, _a_window_that_hides_the_first_tokens),
    "decodes miss themselves": lambda: _with("paged_attention", _ATTENTION, _decodes_that_miss_themselves),
    "prompts see too little": lambda: _with("paged_attention", _ATTENTION, _prompts_that_see_nothing_but_their_chunk),
    "heads of others": lambda: _with("paged_attention", _ATTENTION, _heads_of_others),
    "decodes one place late": lambda: _with("rope_and_cache_write", _ROPE, _decodes_one_place_late),
    "a slot not written": lambda: _with("rope_and_cache_write", _ROPE, _the_last_slot_of_each_block_not_written),
}


def _samples(model: Path) -> list[Sample]:
    settings = {"device": "cpu", "backend": "torch", "dtype": "bfloat16", "session_len": 512, "num_cache_blocks": 128}
    engine = LLMEngine(model, EngineConfig(**settings, block_size=_BLOCK_SIZE, max_batch_size=8))  # type: ignore[arg-type]
    run = run_once(engine, REQUESTS, set(range(len(REQUESTS))))
    engine.close()
    return [Sample(prompt, run.tokens[i], run.logprobs[i]) for i, (prompt, _) in enumerate(REQUESTS)]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checks")
    model = write_checkpoint("llama", folder / "model", **_SIZES)
    groups = {name: [] for name in FAULTS} | {"": []}
    for name in groups:
        with FAULTS.get(name, nullcontext)():
            groups[name] = _samples(model)
    other = shutil.copytree(model, folder / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] *= 1.25
    (other / "config.json").write_text(json.dumps(settings))
    ours = groups[""]
    groups["another base of rotations"] = _samples(other)
    groups["tokens one step late"] = [Sample(x.prompt, x.tokens[:1] + x.tokens[:-1], x.logprobs[:1] + x.logprobs[:-1]) for x in ours]
    groups["each other's tokens"] = [Sample(x.prompt, y.tokens, y.logprobs) for x, y in zip(ours, ours[1:] + ours[:1], strict=True)]
    groups["one token that is not the best"] = [Sample(x.prompt, [*x.tokens[:-1], 7], x.logprobs) for x in ours]
    groups["one log-probability is no number"] = [Sample(x.prompt, x.tokens, [*x.logprobs[:-1], float("nan")]) for x in ours]
    return check(model, groups, "cpu")


def test_what_our_engine_generates_passes(verdicts: dict[str, dict[str, Any]]) -> None:
    assert verdicts[""]["passed"], verdicts[""]


@pytest.mark.parametrize(
    "name",
    [
        *FAULTS, "another base of rotations", "tokens one step late", "each other's tokens", "one token that is not the best",
        "one log-probability is no number",
    ],
)  # fmt: skip
def test_what_a_broken_engine_generates_does_not(verdicts: dict[str, dict[str, Any]], name: str) -> None:
    assert not verdicts[name]["passed"], verdicts[name]
