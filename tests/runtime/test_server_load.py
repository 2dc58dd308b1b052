"""Random clients, many of whom leave in the middle: nothing is lost, nothing stays behind. The long form is `benchmarks.mixed_load`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.mixed_load import Load, wait_until_free
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import running


@pytest.mark.parametrize("workers", [1, 2])
def test_clients_that_leave_at_random_leave_nothing_behind(tmp_path: Path, workers: int) -> None:
    """The cache is too small for all, and the queue short: preemption, refusals and departures meet."""
    model = write_model(tmp_path / "m", step_seconds=0.002, num_cache_blocks=48, session_len=1024)
    flags = ["--max-batch-size=8", "--max-waiting=12", "--block-size=16", "--drain-delay=0", f"--api-workers={workers}"]
    with running(model, *flags) as server:
        load = Load(server.url, seed=workers)
        asyncio.run(load.run(clients=24, seconds=6.0))
        assert not load.surprises, load.surprises[:5]
        assert sum(load.outcomes.values()) > 100 and load.outcomes["leave_stream left"] > 10
        assert not any(wait_until_free(server.url).values())
        assert server.metric("gantline_request_success_total", finished_reason="abort") > 10
    assert server.wait_exit() == 0
    errors = [line for line in server.logs if line["level"] == "error"]
    assert not errors, "neither while it ran nor as the engine closed, which checks its integrity"
