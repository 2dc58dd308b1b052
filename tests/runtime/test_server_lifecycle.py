"""Loading, draining and dying: what clients, probes and Kubernetes see of each."""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from gantline_runtime.server.lifecycle import Lifecycle, State

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, running, wait_until

FAST = ("--drain-delay=0",)


def _stream(server: ServerProcess, tokens: int, prompt: str = "abcdef") -> tuple[str, str | None, list[str]]:
    """(text, finish reason, errors) of a stream, read as plain lines so that nothing of it is hidden."""
    text, reason, errors = "", None, []
    with httpx.Client(timeout=60) as client:
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                return "", None, [response.json()["error"]["code"]]
            done = False
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        errors.append(event["error"]["code"])
                    else:
                        text += event["choices"][0]["text"]
                        reason = event["choices"][0]["finish_reason"] or reason
            assert done != bool(errors), "a stream ends with [DONE] or with an error, never with both"
    return text, reason, errors


def _wait_for_first_tokens(server: ServerProcess, count: int) -> None:
    wait_until(lambda: server.metric("gantline_time_to_first_token_seconds_count") >= count, what=f"{count} requests run")


# ---- states


def test_only_the_ways_of_the_diagram_are_open() -> None:
    clock = [0.0]
    lifecycle = Lifecycle(clock=lambda: clock[0])
    lifecycle.show_progress("weights", 5, 10)
    assert (lifecycle.state, lifecycle.progress, lifecycle.takes_requests) == (State.LOADING, 0.5, False)
    lifecycle.show_progress("warm-up")
    assert lifecycle.state is State.WARMING and lifecycle.progress is None
    lifecycle.enter(State.READY)
    assert lifecycle.is_ready and lifecycle.takes_requests
    lifecycle.drain(3.0)
    assert not lifecycle.is_ready and lifecycle.takes_requests
    clock[0] = 3.1
    assert not lifecycle.takes_requests
    lifecycle.enter(State.DEAD)
    with pytest.raises(AssertionError):
        lifecycle.enter(State.READY)


def test_a_server_that_never_was_ready_takes_nothing_while_it_drains() -> None:
    lifecycle = Lifecycle()
    lifecycle.drain(3.0)
    assert lifecycle.state is State.DRAINING and not lifecycle.takes_requests


# ---- loading


def test_while_loading_the_port_answers_and_tells_how_far_it_is(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", load_seconds=1.5), *FAST).wait_listening()
    try:
        health: dict[str, Any] = {}

        def loads() -> bool:
            answer = server.get("/health")
            assert answer.status_code == 200
            health.update(answer.json())
            return health.get("phase") == "weights" and health["seconds"] > 0

        wait_until(loads, what="the weights load")
        assert health["state"] == "loading" and 0 <= health["progress"] <= 1
        ready = server.get("/ready")
        assert ready.status_code == 503 and ready.json()["error"]["code"] == "not_ready" and ready.json()["state"] == "loading"
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            refused = server.post(path, {})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready" and "retry-after" in refused.headers
        for path in ("/v1/models", "/v1/models/m"):
            assert server.get(path).json()["error"]["code"] == "not_ready"
        assert server.metric("gantline_state", state="loading") == 1
        server.wait_ready()
        assert server.get("/ready").status_code == 200
    finally:
        server.stop()


def test_sigterm_while_loading_ends_at_once(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", load_seconds=60), "--drain-delay=30").wait_listening()
    wait_until(lambda: server.get("/health").json().get("phase") == "weights", what="the weights load")
    engine = server.engine_pid
    server.terminate()
    assert server.wait_exit(10) == 0
    assert server.termination["reason"] == "Drained" and not _alive(engine)


@pytest.mark.parametrize(
    ("error", "reason", "code"),
    [("CheckpointError: weights are broken", "InvalidCheckpoint", 65), ("MemoryError: no room", "OutOfMemory", 70)],
)
def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(tmp_path: Path, error: str, reason: str, code: int) -> None:
    server = ServerProcess(write_model(tmp_path / "m", fail_at="load", error=error))
    assert server.wait_exit() == code
    assert server.termination["reason"] == reason and error.split(": ")[1] in server.termination["message"]
    assert any(line.startswith("gantline: ") and error.split(": ")[1] in line for line in server.lines)


def test_a_folder_without_tokenizer_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", load_seconds=30)
    (folder / "tokenizer.json").write_text("{}")
    server = ServerProcess(folder)
    assert server.wait_exit() == 65
    assert server.termination["reason"] == "InvalidCheckpoint" and server.termination["cure"]


@pytest.mark.parametrize(
    ("script", "words"),
    [({"logprob": math.nan}, "no such number: [nan]"), ({"fail_at": "smoke"}, "the engine refused it")],
)
def test_a_server_whose_own_first_request_gets_no_answer_ends_and_never_was_ready(
    tmp_path: Path, script: dict[str, Any], words: str
) -> None:
    """Whatever the files look like, weights of which no number comes must not be served; the operator rolls such a revision back."""
    server = ServerProcess(write_model(tmp_path / "m", **script))
    assert server.wait_exit() == 65
    assert server.termination["reason"] == "SmokeRequestFailed" and words in server.termination["message"]
    assert server.termination["cure"] and not any("ready" in line for line in server.lines if line.startswith("gantline: "))


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = ServerProcess(write_model(tmp_path / "m"), f"--port={taken.getsockname()[1]}")
        assert server.wait_exit() == 64
    assert server.termination["reason"] == "InvalidConfiguration" and "Address already in use" in server.termination["message"]
    assert [line for line in server.lines if line.startswith("gantline: ")] == server.lines[-1:]


# ---- draining


def test_sigterm_under_load_loses_no_stream(tmp_path: Path) -> None:
    """Streams run when the signal comes, and new ones still come for the time of `drain_delay`."""
    model = write_model(tmp_path / "m", step_seconds=0.01)
    server = ServerProcess(model, "--drain-delay=4", "--drain-timeout=30").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        before = [pool.submit(_stream, server, 150) for _ in range(8)]
        _wait_for_first_tokens(server, 8)
        server.terminate()
        wait_until(lambda: server.get("/ready").status_code == 503, 5, "readiness turns")
        assert server.get("/health").status_code == 200 and server.get("/health").json()["state"] == "draining"
        late = [pool.submit(_stream, server, 100) for _ in range(4)]
        for future, tokens in [(f, 150) for f in before] + [(f, 100) for f in late]:
            text, reason, errors = future.result(60)
            assert (text, reason, errors) == (("abcdef" * 100)[:tokens], "length", [])
    assert server.wait_exit() == 0
    assert server.termination == {"reason": "Drained", "message": "all requests were answered"}


def test_after_the_delay_new_requests_are_sent_elsewhere_while_old_ones_finish(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.02), "--drain-delay=0", "--drain-timeout=30").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running_stream = pool.submit(_stream, server, 100)
        _wait_for_first_tokens(server, 1)
        server.terminate()
        wait_until(lambda: server.get("/ready").status_code == 503, 5, "readiness turns")
        refused = server.post("/v1/completions", {"prompt": "a"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
        assert running_stream.result(30)[1:] == ("length", [])
    assert server.wait_exit() == 0


def test_what_does_not_finish_in_time_ends_with_an_error_event(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.02), "--drain-delay=0", "--drain-timeout=1").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = pool.submit(_stream, server, 4000)
        whole = pool.submit(server.post, "/v1/completions", {"prompt": "a", "max_tokens": 4000, "ignore_eos": True})
        _wait_for_first_tokens(server, 2)
        began = time.monotonic()
        server.terminate()
        text, reason, errors = stream.result(30)
        assert text and reason is None and errors == ["shutting_down"]
        assert whole.result(30).status_code == 503 and whole.result().json()["error"]["code"] == "shutting_down"
    assert server.wait_exit() == 0
    assert time.monotonic() - began < 10
    assert server.termination["reason"] == "Drained" and "2 requests were cut off" in server.termination["message"]


def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.05), "--drain-delay=30", "--drain-timeout=60").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(_stream, server, 4000)
        _wait_for_first_tokens(server, 1)
        server.process.send_signal(signal.SIGINT)
        server.wait_log("draining")
        server.process.send_signal(signal.SIGINT)
        assert stream.result(20)[2] == ["shutting_down"]
    assert server.wait_exit(20) == 0


# ---- dying


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _with_running_requests(server: ServerProcess, then: Any) -> tuple[tuple[str, str | None, list[str]], httpx.Response]:
    """Run a stream and a whole answer, call `then` in the middle, and give what their clients got."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = pool.submit(_stream, server, 4000)
        whole = pool.submit(server.post, "/v1/completions", {"prompt": "a", "max_tokens": 4000, "ignore_eos": True})
        _wait_for_first_tokens(server, 2)
        then()
        return stream.result(30), whole.result(30)


def test_a_killed_engine_ends_requests_with_an_error_and_the_server_with_a_reason(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.02), *FAST).wait_ready()
    (text, _, errors), whole = _with_running_requests(server, lambda: os.kill(server.engine_pid, signal.SIGKILL))
    assert text and errors == ["engine_dead"]
    assert whole.status_code == 500 and whole.json()["error"]["code"] == "engine_dead" and "SIGKILL" in whole.json()["error"]["message"]
    assert server.wait_exit(20) == 70
    assert server.termination["reason"] == "InternalError" and "SIGKILL" in server.termination["message"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "CudaError"),
        ("ValueError: a defect", "InternalError"),
    ],
)
def test_an_engine_that_raises_ends_the_server_with_the_reason_of_the_exception(tmp_path: Path, error: str, reason: str) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.01, fail_at="step", error=error), *FAST).wait_ready()
    text, finish, errors = _stream(server, 1000)
    assert text and finish is None and errors == ["engine_dead"]
    assert server.wait_exit(20) == 70
    assert server.termination["reason"] == reason and error.split(": ", 1)[1] in server.termination["message"]


def test_a_stuck_engine_turns_health_and_a_busy_or_idle_one_does_not(tmp_path: Path) -> None:
    with running(write_model(tmp_path / "m", step_seconds=0.02), "--step-timeout=1", *FAST) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            busy = pool.submit(_stream, server, 70)
            for _ in range(3):
                assert server.get("/health").status_code == 200
                time.sleep(0.5)
            assert busy.result()[1] == "length"
        time.sleep(1.3)
        assert server.get("/health").status_code == 200, "an idle engine is healthy"
        engine = server.engine_pid
        os.kill(engine, signal.SIGSTOP)
        try:
            seconds = wait_until(lambda: server.get("/health").status_code == 503, 10, "health turns")
            assert 0.4 < seconds < 5
            health = server.get("/health").json()
            assert health["error"]["code"] == "engine_stuck" and health["state"] == "ready"
            assert server.get("/ready").json()["error"]["code"] == "engine_stuck", "nor is it sent requests"
        finally:
            os.kill(engine, signal.SIGCONT)
        wait_until(lambda: server.get("/health").status_code == 200, 10, "health recovers")
        assert _stream(server, 10)[1] == "length"


def test_an_engine_that_speaks_but_does_not_get_on_turns_health(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", step_seconds=0.02, stalls_at=30)
    flags = ("--step-timeout=1", "--drain-delay=0", "--drain-timeout=0")
    with running(model, *flags) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        stream = pool.submit(_stream, server, 100)
        wait_until(lambda: server.get("/health").status_code == 503, 10, "health turns")
        assert server.get("/health").json()["error"]["code"] == "engine_stuck"
        server.terminate()
        assert stream.result(20)[2] == ["shutting_down"]


def test_an_engine_that_compiles_a_kernel_is_not_stuck(tmp_path: Path) -> None:
    with running(write_model(tmp_path / "m", compile_seconds=3.0), "--step-timeout=1", *FAST) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stream = pool.submit(_stream, server, 40)
            seen = []
            while not stream.done():
                seen.append(server.get("/health").status_code)
                time.sleep(0.1)
            assert stream.result()[1] == "length"
        assert len(seen) > 20 and set(seen) == {200}


def test_tritons_compilations_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    from gantline_runtime import compilation
    from triton import knobs

    for name in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(knobs.runtime, name, None)
    monkeypatch.setattr(compilation, "_announce", compilation._announce)
    said: list[float] = []
    compilation.announce_compilations(said.append)
    assert not knobs.runtime.jit_cache_hook(key="k", repr="r", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
    knobs.runtime.jit_post_compile_hook(key="k", repr="r", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
    assert said == [compilation.MOST_COMPILE_S, 0.0]


def test_a_request_that_the_engine_cannot_compute_fails_alone(tmp_path: Path) -> None:
    """Its neighbours of the same step lose no token, and the server serves on."""
    with running(write_model(tmp_path / "m", step_seconds=0.01, fail_at="launch", error="RuntimeError: shapes differ"), *FAST) as server:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(_stream, server, 100) for _ in range(4)]
            _wait_for_first_tokens(server, 4)
            for stream in (False, True):
                failed = server.post("/v1/completions", {"prompt": "bad\x01", "stream": stream})
                assert failed.status_code == 500 and failed.json()["error"]["code"] == "engine_error"
                assert "shapes differ" in failed.json()["error"]["message"]
            for future in streams:
                assert future.result(30) == (("abcdef" * 17)[:100], "length", [])
        assert server.get("/health").status_code == 200
        wait_until(lambda: server.metric("gantline_kv_cache_usage_perc") == 0, what="the blocks are free")


def test_the_engine_dies_with_its_server(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.02), *FAST).wait_ready()
    engine = server.engine_pid
    server.process.kill()
    server.wait_exit()
    wait_until(lambda: not _alive(engine), 5, "the engine ends")
