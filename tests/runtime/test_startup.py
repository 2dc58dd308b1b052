"""What a start of `gantline serve` consists of, and what it does not wait for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from gantline_runtime.child_process import became_process_at

from tests.runtime.server_process import REAL, ROOT, ServerProcess, running

MODEL = ROOT / "examples" / "tiny-model"
PHASES = ("launch", "import", "device", "weights", "cache", "warm-up")
"""One after the other."""

pytestmark = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the tiny model is not here")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ServerProcess, float]]:
    """A server that is ready, and the seconds that took as its parent sees them."""
    began = time.monotonic()
    with running(MODEL, "--drain-delay=0", "--device=cpu", "--num-cache-blocks=64", program=REAL) as server:
        yield server, time.monotonic() - began


def test_the_phases_of_a_start_add_up_to_the_time_from_its_exec(server: tuple[ServerProcess, float]) -> None:
    seconds = {phase: server[0].metric("gantline_startup_seconds", phase=phase) for phase in (*PHASES, "listen", "tokenizer", "total")}
    assert min(seconds.values()) >= 0
    assert seconds["total"] <= server[1] + 0.05, "no longer than its parent waited"
    assert seconds["total"] >= 0.6 * server[1] - 0.5, "it counts from the exec, imports and all"
    assert 0.5 * seconds["total"] <= sum(seconds[phase] for phase in PHASES) <= seconds["total"] + 0.05
    assert seconds["launch"] < seconds["listen"] < seconds["total"]


def test_a_process_knows_when_it_was_started() -> None:
    before = time.monotonic()
    program = "import time; time.sleep(0.5); from gantline_runtime.child_process import became_process_at; print(became_process_at())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert before - 0.02 <= float(done.stdout) <= time.monotonic() - 0.5
    assert became_process_at() < before
