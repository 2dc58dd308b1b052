"""Several API processes on one port, in front of one engine: one server, whoever answers."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.mmap_dict import MmapedDict

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import TRUSTS_NOBODY, ServerProcess, running, wait_until
from tests.runtime.test_server_lifecycle import _stream

WORKERS = ("--api-workers=2", "--drain-delay=0")


def _worker_pids(server: ServerProcess) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"gantline_runtime.server.follower" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _ask(server: ServerProcess) -> httpx.Response:
    """On a connection of its own, so that the kernel chooses a process anew."""
    return httpx.post(
        server.url + "/v1/completions", json={"prompt": "abc", "max_tokens": 5, "ignore_eos": True}, timeout=60, verify=TRUSTS_NOBODY
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("workers") / "m", step_seconds=0.005)
    with running(model, *WORKERS, "--drain-timeout=20") as server:
        yield server


def test_each_process_answers_and_whoever_is_asked_counts_for_all(server: ServerProcess) -> None:
    assert len(_worker_pids(server)) == 1
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        responses = [future.result() for future in [pool.submit(_ask, server) for _ in range(60)]]
    assert {response.json()["choices"][0]["text"] for response in responses} == {"abcab"}
    texts = [httpx.get(server.url + "/metrics", timeout=60, verify=TRUSTS_NOBODY).text for _ in range(12)]
    for text in texts:
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(lines["gantline_generation_tokens_total"]) == 300
        assert float(lines["gantline_time_to_first_token_seconds_count"]) == 60
        assert float(lines['gantline_http_requests_total{method="POST",route="/v1/completions",status="200"}']) == 60
        assert float(lines['gantline_state{state="ready"}']) == 1 and float(lines['gantline_startup_seconds{phase="total"}']) > 0
        assert "# HELP gantline_generation_tokens_total Tokens generated." in text
    for pid in (server.process.pid, *_worker_pids(server)):
        assert _requests_answered_by(server, pid) > 0, "the kernel spreads connections over all"


def _requests_answered_by(server: ServerProcess, pid: int) -> float:
    """From the file of counters that each process writes."""
    environment = Path(f"/proc/{_worker_pids(server)[0]}/environ").read_text().split("\0")
    folder = next(value.partition("=")[2] for value in environment if value.startswith("PROMETHEUS_MULTIPROC_DIR="))
    values = MmapedDict.read_all_values_from_file(f"{folder}/counter_{pid}.db")
    return float(sum(value for key, value, _, _ in values if "gantline_http_requests" in key))


def test_probes_and_models_answer_alike_everywhere(server: ServerProcess) -> None:
    for _ in range(10):
        assert httpx.get(server.url + "/ready", timeout=60, verify=TRUSTS_NOBODY).json()["state"] == "ready"
        assert httpx.get(server.url + "/health", timeout=60, verify=TRUSTS_NOBODY).status_code == 200
        assert httpx.get(server.url + "/v1/models", timeout=60, verify=TRUSTS_NOBODY).json()["data"][0]["max_model_len"] == 4096


def test_sigterm_under_load_loses_no_stream_of_any_process(tmp_path: Path) -> None:
    """Who comes late is answered whole, or, on a machine too slow for the delay, sent elsewhere; never cut off."""
    model = write_model(tmp_path / "m", step_seconds=0.01)
    server = ServerProcess(model, "--api-workers=2", "--drain-delay=3", "--drain-timeout=30").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        before = [pool.submit(_stream, server, 150) for _ in range(16)]
        wait_until(lambda: server.metric("gantline_time_to_first_token_seconds_count") >= 16, what="16 requests run")
        server.terminate()
        server.wait_log("draining")
        late = [pool.submit(_stream, server, 50) for _ in range(6)]
        assert {httpx.get(server.url + "/ready", timeout=60, verify=TRUSTS_NOBODY).status_code for _ in range(6)} == {503}, (
            "readiness has turned everywhere"
        )
        assert [future.result(60) for future in before] == [(("abcdef" * 25), "length", [])] * 16
        ends = [future.result(60) for future in late]
        assert all(end in ((("abcdef" * 9)[:50], "length", []), ("", None, ["draining"])) for end in ends), ends
    assert server.wait_exit() == 0
    assert server.termination == {"reason": "Drained", "message": "all requests were answered"}


def test_what_does_not_finish_in_time_is_cut_off_in_every_process(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.02), *WORKERS, "--drain-timeout=1").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(_stream, server, 4000) for _ in range(8)]
        wait_until(lambda: server.metric("gantline_time_to_first_token_seconds_count") >= 8, what="8 requests run")
        server.terminate()
        assert [stream.result(30)[2] for stream in streams] == [["shutting_down"]] * 8
    assert server.wait_exit() == 0
    assert "8 requests were cut off" in server.termination["message"]


@pytest.mark.parametrize("victim", ["engine", "worker"])
def test_a_process_that_dies_ends_the_server_with_its_reason(tmp_path: Path, victim: str) -> None:
    server = ServerProcess(write_model(tmp_path / "m", step_seconds=0.02), *WORKERS).wait_ready()
    workers, engine = _worker_pids(server), server.engine_pid
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(_stream, server, 4000) for _ in range(16)]
        wait_until(lambda: server.metric("gantline_time_to_first_token_seconds_count") >= 16, what="16 requests run")
        os.kill(engine if victim == "engine" else workers[0], signal.SIGKILL)
        ends = []
        for stream in streams:
            try:
                ends.append(stream.result(30)[2])
            except httpx.HTTPError:
                assert victim == "worker", "who was connected to the process that died has lost its connection"
        assert ends and all(end == ["engine_dead"] for end in ends)
    assert server.wait_exit(20) == 70
    what = "engine process" if victim == "engine" else "API process worker-1"
    assert server.termination["reason"] == "InternalError" and f"{what} was killed by SIGKILL" in server.termination["message"]
    for pid in (*workers, engine):
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 5, "everything ends")  # type: ignore[misc]


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_own_reason(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", load_seconds=30)
    (folder / "tokenizer.json").write_text("{}")
    server = ServerProcess(folder, *WORKERS)
    assert server.wait_exit() == 65
    assert server.termination["reason"] == "InvalidCheckpoint"


def test_sigterm_while_loading_ends_all_at_once(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m", load_seconds=60), *WORKERS).wait_listening()
    wait_until(lambda: len(_worker_pids(server)) == 1, what="the other process is there")
    pids = [*_worker_pids(server), server.engine_pid]
    server.terminate()
    assert server.wait_exit(15) == 0 and server.termination["reason"] == "Drained"
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_hung_process_ends_the_server(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m"), *WORKERS, "--step-timeout=1.5").wait_ready()
    os.kill(_worker_pids(server)[0], signal.SIGSTOP)
    assert server.wait_exit(30) == 70
    assert "worker-1 has not been heard of" in server.termination["message"]


def test_the_others_die_with_the_first(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m"), *WORKERS).wait_ready()
    workers = _worker_pids(server)
    server.process.kill()
    server.wait_exit()
    for pid in workers:
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 5, "it ends")  # type: ignore[misc]


def test_a_port_that_another_server_shares_is_taken(tmp_path: Path, server: ServerProcess) -> None:
    second = ServerProcess(write_model(tmp_path / "m"), *WORKERS, f"--port={server.url.rsplit(':', 1)[1]}")
    assert second.wait_exit() == 64 and "Address already in use" in second.termination["message"]
