"""Random clients, many of whom leave in the middle: nothing is lost, nothing stays behind. The long form is `benchmarks.mixed_load`."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from gantline_runtime.messages import PromptLogprobs
from gantline_runtime.server.answers import AnswerWriter, WholeChoice

from benchmarks.mixed_load import Load, wait_until_free
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import running


def test_long_texts_keep_neither_short_ones_nor_probes_waiting(tmp_path: Path) -> None:
    """Several take all of their processor for seconds; who asks with a few words is answered before any of them."""
    with running(write_model(tmp_path / "m"), "--drain-delay=0") as server, ThreadPoolExecutor(4) as pool:
        long = [pool.submit(httpx.post, f"{server.url}/tokenize", json={"prompt": "a list is " * 200_000}, timeout=300) for _ in range(4)]
        time.sleep(0.5)
        for _ in range(3):
            assert server.post("/v1/completions", {"prompt": "ab", "max_tokens": 1}).status_code == 200
            assert server.get("/health").status_code == 200
        assert not any(request.done() for request in long[1:]), "they are still at it"
        assert [request.result().json()["count"] for request in long] == [2_000_001] * 4


class _Writer(AnswerWriter):
    async def collect(self, first: Any) -> list[WholeChoice]:
        scores = PromptLogprobs(start=1, chosen=[-0.5] * len(first), top_ids=[], top_logprobs=[], ranks=[])
        return [WholeChoice(prompt_logprobs=[scores])]

    def build_whole(self, choices: Any) -> dict[str, Any]:
        return {"on_loop": threading.current_thread() is threading.main_thread()}


@pytest.mark.parametrize(("scores", "on_loop"), [(10, True), (60_000, False)])
async def test_an_answer_with_the_scores_of_a_long_prompt_is_written_beside_the_event_loop(scores: int, on_loop: bool) -> None:
    writer = _Writer(None, None, {})  # type: ignore[arg-type]
    assert await writer.whole([None] * scores) == {"on_loop": on_loop}  # type: ignore[list-item]


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_leave_at_random_leave_nothing_behind(tmp_path: Path, workers: int) -> None:
    """The cache is too small for all, and the queue short: preemption, refusals and departures meet."""
    model = write_model(tmp_path / "m", step_seconds=0.002, num_cache_blocks=48, session_len=1024)
    flags = ["--max-batch-size=8", "--max-waiting=12", "--block-size=16", "--drain-delay=0", f"--api-workers={workers}"]
    with running(model, *flags) as server:
        load = Load(server.url, seed=workers)
        asyncio.run(load.run(clients=24, seconds=3.0))
        assert not load.surprises, load.surprises[:5]
        assert sum(load.outcomes.values()) > 100 and load.outcomes["leave_stream left"] > 10
        assert not any(wait_until_free(server.url).values())
        assert server.metric("gantline_request_success_total", finished_reason="abort") > 10
    assert server.wait_exit() == 0
    errors = [line for line in server.logs if line["level"] == "error"]
    assert not errors, "neither while it ran nor as the engine closed, which checks its integrity"
