"""How figures come about: emptied caches, medians, and what may stand beside each other in one file."""

from __future__ import annotations

import json
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from benchmarks import throughput, workloads
from benchmarks.throughput import Run, measure, run_once
from benchmarks.workloads import Workload
from tests.runtime.engine_support import expected_tokens, fake_engine

REQUESTS = [(list(range(i, i + 100)), 20) for i in range(6)]


def test_a_repeat_begins_with_an_empty_cache_and_requests_run_in_order_of_arrival() -> None:
    engine, executor = fake_engine(max_batch_size=2)
    for _ in range(2):
        executor.steps.clear()
        run = run_once(engine, REQUESTS)
        assert run.tokens == [expected_tokens(prompt, count) for prompt, count in REQUESTS]
        assert run.first_token_s == sorted(run.first_token_s)
    assert engine.stats().num_cached_tokens == 0
    found = []
    for _ in range(2):
        before = engine.stats().num_cached_tokens
        run_once(engine, [REQUESTS[0], REQUESTS[0], REQUESTS[0]])
        found.append(engine.stats().num_cached_tokens - before)
    assert found[0] == found[1] > 0, "within a repeat prompts are reused"


def test_a_run_that_ends_early_does_not_count() -> None:
    engine, _ = fake_engine(session_len=110)
    with pytest.raises((RuntimeError, ValueError)):
        run_once(engine, REQUESTS)


def _run_of(seconds: float, requests: list[tuple[list[int], int]]) -> Run:
    return Run(seconds, [[1] * count for _, count in requests], [[-1.0] * count for _, count in requests], [0.0] * len(requests))


def test_figures_are_medians_and_a_next_token_is_what_a_full_run_takes_beyond_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 2.0, 4.0, 3.0, 99.0, 258.0, 200.0])
    asked: list[list[int]] = []

    def run(_: Any, requests: list[tuple[list[int], int]], checked: Set[int] = frozenset()) -> Run:
        asked.append([count for _, count in requests])
        return _run_of(next(seconds), requests)

    monkeypatch.setattr(throughput, "run_once", run)
    engine, _ = fake_engine()
    figures, samples = measure(engine, workloads.build("single"), 3)  # type: ignore[arg-type]
    assert asked == [[1]] * 5 + [[256]] * 3
    assert figures["first_ms"] == 3000.0
    assert figures["next_ms"] == round((200.0 - 3.0) / 255 * 1e3, 3)
    assert figures["seconds"] == [99.0, 258.0, 200.0] and len(samples) == 1
    seconds = iter([5.0, 2.0, 4.0])
    monkeypatch.setattr(throughput, "_host_times", lambda *_: {})
    figures, samples = measure(engine, Workload("other", REQUESTS, 256), 3)  # type: ignore[arg-type]
    assert figures == {"out_tok_s": 30.0, "in_out_tok_s": 180.0, "seconds": [5.0, 2.0, 4.0], "host": {}}
    assert len(samples) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--http"], "--http records nothing"),
        (["--eager"], "--eager"),
        (["--backend", "triton"], "other backends"),
        (["--max-step-ms", "50"], "--max-step-ms"),
        (["--repeats", "2"], "medians of 3"),
        ([], "are of NVIDIA H200, this is none"),
    ],
)
def test_only_rows_that_can_be_compared_stand_in_one_file(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput.torch.cuda, "is_available", lambda: False)
    out = tmp_path / "rows.json"
    out.write_text(json.dumps({"chat": {"versions": {"gpu": "NVIDIA H200, 580.1"}}}))
    before = out.read_text()
    monkeypatch.setattr(sys, "argv", ["throughput", "--model", str(tmp_path), "--out", str(out), *arguments])
    with pytest.raises(SystemExit):
        throughput.main()
    assert said in capsys.readouterr().err
    assert out.read_text() == before
