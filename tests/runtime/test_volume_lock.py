"""The lock of a volume that several nodes mount: one holder at a time, whoever is killed, asleep or late."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from gantline_runtime import volume_lock
from gantline_runtime.volume_lock import LOCKS, LockLost, VolumeLock


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_lock, "RENEW_S", 0.05)
    monkeypatch.setattr(volume_lock, "POLL_S", 0.01)
    monkeypatch.setattr(volume_lock, "STALE_S", 60.0)


def test_many_processes_hold_it_one_after_the_other(tmp_path: Path) -> None:
    children = [_fork(tmp_path, rounds=8) for _ in range(6)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 48


def _fork(root: Path, rounds: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        for _ in range(rounds):
            with VolumeLock(root, "x"), (root / "log").open("a") as log:
                log.write("in\n")
                log.flush()
                time.sleep(0.002)
                log.write("out\n")
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_a_killed_holder_is_followed_and_its_successor_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if not child:
        VolumeLock(tmp_path, "x").take()
        os._exit(0)  # without giving it back, as a killed process
    os.waitpid(child, 0)
    monkeypatch.setattr(volume_lock, "STALE_S", 0.3)
    with VolumeLock(tmp_path, "x") as lock:
        lock.check()
        late = VolumeLock(tmp_path, "x")
        assert not late.try_take()
    assert late.try_take(), "given back"
    late.release()


def test_a_holder_that_renews_is_waited_for_however_long_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_lock, "STALE_S", 0.5)
    with VolumeLock(tmp_path, "x"):
        other, began = VolumeLock(tmp_path, "x"), time.monotonic()
        while time.monotonic() - began < 1.0:
            assert not other.try_take()
            time.sleep(0.01)


def test_a_holder_that_was_asleep_is_told_that_it_was_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = threading.Event()
    sleeper = VolumeLock(tmp_path, "x", lost=lost.set)
    monkeypatch.setattr(volume_lock, "RENEW_S", 0.5)
    sleeper.take()
    monkeypatch.setattr(volume_lock, "STALE_S", 0.1)
    with VolumeLock(tmp_path, "x"):
        assert lost.wait(10)
        with pytest.raises(LockLost, match="taken over"):
            sleeper.check()
        sleeper.release()
        assert not VolumeLock(tmp_path, "x").try_take(), "what the sleeper gives back is not its successor's"


def test_a_volume_that_does_not_answer_for_a_while_makes_nobody_look_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(volume_lock.time, "monotonic", lambda: now)
    monkeypatch.setattr(volume_lock, "POLL_S", 2.0)
    monkeypatch.setattr(volume_lock, "RENEW_S", 3600.0)
    with VolumeLock(tmp_path, "x"):
        other = VolumeLock(tmp_path, "x")
        for now in (0.0, 2.0, 600.0, 602.0):  # noqa: B007 - two looks ten minutes apart: the volume hung
            assert not other.try_take()


def test_old_numbers_are_swept(tmp_path: Path) -> None:
    for _ in range(20):
        with VolumeLock(tmp_path, "x"):
            pass
    assert len(list((tmp_path / LOCKS).iterdir())) <= 9
