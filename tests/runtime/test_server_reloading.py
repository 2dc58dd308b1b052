"""Files that are read again when they change, at whatever moment somebody looks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from gantline_runtime.server import reloading


async def test_a_look_at_files_that_are_being_replaced_is_not_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("one")
    loaded: list[str] = []
    reloader = reloading.Reloader(period_s=0.01)
    reloader.watch([tmp_path], lambda: loaded.append((tmp_path / "key").read_text()))
    found = asyncio.Event()
    fingerprint = reloading._fingerprint

    def vanishing(paths: object) -> object:
        monkeypatch.setattr(reloading, "_fingerprint", fingerprint)
        found.set()
        raise FileNotFoundError("the folder was listed while its link was replaced")

    monkeypatch.setattr(reloading, "_fingerprint", vanishing)
    running = asyncio.create_task(reloader.run())
    await asyncio.wait_for(found.wait(), 10)
    (tmp_path / "key").write_text("number two")
    async with asyncio.timeout(10):
        while not loaded:
            await asyncio.sleep(0.01)
            assert not running.done(), "it goes on"
    running.cancel()
    assert loaded == ["number two"]
