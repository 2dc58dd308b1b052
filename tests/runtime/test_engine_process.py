"""The engine's side of the process boundary, over real sockets, one turn of its loop at a time."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq
from gantline_runtime import engine_launch, garbage
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_messages import (
    EngineFailed,
    EngineMessage,
    EngineProgress,
    EngineReport,
    RequestRefused,
    Shutdown,
    StepOutputs,
)
from gantline_runtime.engine_process import EngineServer, _begin_import, _load, _Phases
from gantline_runtime.engine_settings import EngineSettings
from gantline_runtime.messages import AbortRequest, EngineRequest, SamplingParams
from gantline_runtime.reading_ahead import ReadingAhead

from tests.runtime.server_fakes import EchoEngine, _Progress, write_model

PROMPT = [256, *range(100)]


class Peer:
    """One API process and the engine's server, in one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], engine: EchoEngine, name: str) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.router.bind(f"inproc://{name}")
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.connect(f"inproc://{name}")
        self.engine = engine
        self.server = EngineServer(self.router, lambda _: engine)
        self.dealer.send(b"")
        self.server._await_peer()
        self._decoder = msgspec.msgpack.Decoder[EngineMessage](EngineMessage)

    def send(self, message: EngineRequest | AbortRequest | Shutdown) -> None:
        self.dealer.send(msgspec.msgpack.encode(message))
        assert self.router.poll(1000)
        self.server._receive(self.engine, wait=False)

    def step(self) -> None:
        self.server._send(self.engine.step())

    def received(self) -> list[EngineMessage]:
        messages = []
        while self.dealer.poll(50):
            messages.append(self._decoder.decode(self.dealer.recv()))
        return messages


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    context = zmq.Context[zmq.Socket[bytes]]()
    engine = EchoEngine(str(write_model(tmp_path / "m", endless=True)), EngineConfig(max_batch_size=1, max_waiting=1, block_size=16))
    peer = Peer(context, engine, "engine")
    yield peer
    peer.router.close(0)
    peer.dealer.close(0)
    context.term()


def _request(name: str, prompt: list[int] = PROMPT) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_ids=prompt, sampling=SamplingParams(max_new_tokens=500))


def test_the_log_says_once_where_tritons_kernels_came_from(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts = SimpleNamespace(image=0, cache=0, compiled=0)
    monkeypatch.setitem(sys.modules, "gantline_kernels.prebuilt", SimpleNamespace(counts=counts))
    with caplog.at_level(logging.INFO, logger="gantline.engine"):
        for image, compiled in ((0, 0), (21, 0), (21, 0), (21, 2)):
            counts.image, counts.compiled = image, compiled
            peer.server._last_report = -1e9
            peer.server._report_if_due(peer.engine)
    assert [record.getMessage() for record in caplog.records] == [
        "Triton kernels: 21 from the image, 0 from the cache, 0 compiled",
        "Triton kernels: 21 from the image, 0 from the cache, 2 compiled",
    ]
    reports = [message for message in peer.received() if isinstance(message, EngineReport)]
    assert reports[-1].kernels == {"image": 21, "cache": 0, "compiled": 2}


def test_an_engine_that_rests_makes_things_ready_until_a_request_comes(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    left, waits = [True] * 5, []
    monkeypatch.setattr(peer.engine, "prepare", lambda: bool(left) and left.pop())
    receive = peer.server._receive
    monkeypatch.setattr(peer.server, "_receive", lambda engine, *, wait: (waits.append(wait), receive(engine, wait=False)))
    peer.server._turn(peer.engine)
    assert len(left) == 5 and waits == [True], "not right after the start"
    peer.server._worked_at -= 60
    for _ in range(2):
        peer.server._turn(peer.engine)
    assert len(left) == 3 and waits[1:] == [False, False], "messages are looked for in between"
    peer.dealer.send(msgspec.msgpack.encode(_request("a")))
    assert peer.router.poll(1000)
    for _ in range(3):
        peer.server._turn(peer.engine)
    assert len(left) == 2, "the request was read after one more, and then it goes first"
    assert any(isinstance(message, StepOutputs) for message in peer.received())
    peer.send(AbortRequest("a"))
    peer.server._turn(peer.engine)
    assert len(left) == 2, "and it has just worked"
    peer.server._worked_at -= 60
    for _ in range(4):
        peer.server._turn(peer.engine)
    assert not left and waits[-1], "with nothing left it waits"


def test_an_aborted_request_gives_nothing_more_and_its_blocks_are_free_before_the_next_step(peer: Peer) -> None:
    peer.send(_request("a"))
    for _ in range(5):
        peer.step()
    assert peer.engine.stats().cache_usage > 0
    peer.received()
    peer.send(AbortRequest("a"))
    assert peer.engine.stats().cache_usage == 0 and not peer.engine.has_work()
    peer.step()
    assert peer.received() == []


def test_a_waiting_request_that_is_aborted_never_runs(peer: Peer) -> None:
    peer.send(_request("a"))
    peer.step()
    peer.send(_request("b"))
    peer.send(AbortRequest("b"))
    for _ in range(3):
        peer.step()
    outputs = [output.request_id for message in peer.received() if isinstance(message, StepOutputs) for output in message.outputs]
    assert set(outputs) == {"a"} and len(outputs) == 4


def test_what_the_engine_refuses_is_told_with_its_kind(peer: Peer) -> None:
    peer.send(_request("empty", []))
    for name in ("a", "b"):
        peer.send(_request(name))
        peer.step()
    peer.send(_request("c"))
    refusals = [message for message in peer.received() if isinstance(message, RequestRefused)]
    assert [(refusal.request_id, refusal.code) for refusal in refusals] == [("empty", "invalid"), ("c", "queue_full")]


def test_an_abort_of_an_unknown_request_is_no_harm(peer: Peer) -> None:
    peer.send(AbortRequest("nobody"))
    assert peer.received() == []


def test_a_report_comes_at_once_and_then_when_it_is_due(peer: Peer) -> None:
    for _ in range(3):
        peer.server._report_if_due(peer.engine)
    reports = peer.received()
    assert len(reports) == 1 and isinstance(reports[0], EngineReport)
    assert reports[0].reserved_bytes == {"weights": 1000, "cache": 2000} and reports[0].num_cache_blocks == 256


def test_a_failure_is_told_to_everyone_with_its_reason(peer: Peer) -> None:
    assert peer.server.fail(MemoryError("no room")) == 70
    (message,) = peer.received()
    assert isinstance(message, EngineFailed) and message.reason == "OutOfMemory" and "no room" in message.message


def test_shutdown_ends_the_loop(peer: Peer) -> None:
    for data in (b"", msgspec.msgpack.encode(_request("a")), msgspec.msgpack.encode(Shutdown())):
        peer.dealer.send(data)
    peer.server.run()
    assert peer.engine.has_work(), "what still runs is dropped, not finished"


def test_progress_is_passed_on_sparingly_and_every_phase_is_timed() -> None:
    sent: list[EngineMessage] = []
    now = time.monotonic()
    phases = _Phases(sent.append, (now - 3, now - 2))
    for i in range(1000):
        phases.on_progress(_Progress("weights", i, 1000))
    phases.on_progress(_Progress("cache", 0, 0))
    assert list(phases.finish()) == ["launch", "import", "weights", "cache"] and all(seconds >= 0 for seconds in phases.seconds.values())
    assert phases.seconds["launch"] == pytest.approx(1) and 2 <= phases.seconds["import"] < 2.5
    shown = [message.phase for message in sent if isinstance(message, EngineProgress)]
    assert shown[0] == "import" and shown[-1] == "cache" and len(shown) < 20


def test_a_long_temporary_folder_does_not_break_the_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(engine_launch.tempfile, "gettempdir", lambda: str(deep))
    folder = engine_launch._socket_folder()
    assert len(str(folder / "engine")) < 100 and folder.stat().st_mode & 0o077 == 0
    folder.rmdir()


def test_an_engine_that_is_loaded_is_out_of_the_garbage_collectors_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[str] = []
    monkeypatch.setattr(garbage, "settle", lambda: settled.append("settled"))
    monkeypatch.setattr(garbage, "collect_by_hand", lambda: settled.append("by hand"))
    folder = str(write_model(tmp_path / "m"))
    settings = EngineSettings(endpoint="", parent_pid=0, model_dir=folder, engine_config={}, engine="tests.runtime.server_fakes:EchoEngine")
    importing = _begin_import("tests.runtime.server_fakes")
    ahead = ReadingAhead(Path(folder))
    assert isinstance(_load(settings, importing, ahead, None)(lambda _: None), EchoEngine)
    assert not importing.is_alive()
    assert settled == ["settled", "by hand"]


def test_the_engine_is_launched_before_the_server_is_imported(tmp_path: Path) -> None:
    """Its imports take longest of all, so they must not wait for the server's."""
    program = (
        "import sys\n"
        "from gantline_runtime import cli\n"
        "from gantline_runtime.commands import serve\n"
        "def launch(*args, **kwargs):\n"
        "    print({'starlette', 'tokenizers', 'torch', 'prometheus_client', 'msgspec', 'asyncio', 'tqdm'} & set(sys.modules))\n"
        "    raise SystemExit(0)\n"
        "serve.launch_engine = launch\n"
        f"cli.main(['serve', {str(tmp_path)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
