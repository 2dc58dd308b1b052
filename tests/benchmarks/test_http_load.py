"""The load that goes through the server, on the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.http_load import run_over_http
from benchmarks.serving import running_server

MODEL = Path(__file__).parents[2] / "examples/tiny-model"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running_server(MODEL, ["--max-batch-size=4", "--session-len=256", "--num-cache-blocks=32"]) as port:
        yield port


def test_every_request_of_a_load_over_http_is_streamed_to_its_end(port: int) -> None:
    run = run_over_http(port, [([5, 6, 7, 8 + i], 3 + i) for i in range(6)], clients=2)
    assert len(run.first_s) == 6 and 0 < min(run.first_s) <= max(run.first_s) < run.seconds
    assert len(run.between_s) == 6
    assert run.summary()["between_ms_median"] > 0
    assert sum(range(3, 9)) - 6 <= run.events <= sum(range(3, 9)) + 6


def test_prompts_may_be_text(port: int) -> None:
    run = run_over_http(port, [("a word", 3), ("two words", 4)], clients=1)
    assert len(run.first_s) == 2


def test_a_refused_request_fails_the_load(port: int) -> None:
    with pytest.raises(RuntimeError, match="refused"):
        run_over_http(port, [([5] * 300, 3)], clients=1)
