"""What tests of `gantline fetch` share, whatever the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gantline_runtime import termination
from gantline_runtime.volume_lock import LOCKS

from tests.runtime.file_server import Faults

SMALL_STEPS = (
    "import sys, huggingface_hub.constants as constants; constants.DOWNLOAD_CHUNK_SIZE = 1 << 14;"
    "from gantline_runtime import volume_lock as lock; lock.RENEW_S, lock.POLL_S, lock.STALE_S = 0.2, 0.05, 3.0;"
    "from gantline_runtime.cli import main; sys.exit(main())"
)


def last_word(tmp_path: Path) -> termination.TerminationMessage:
    message = termination.parse((tmp_path / "last-word").read_text())
    assert message is not None
    return message


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def kill_mid_download(uri: str, target: Path, server: Faults, *, received: int) -> None:
    """Start a fetch, and SIGKILL it once `received` bytes of the download that `server` stalls are on the disk. Then nothing stalls."""
    process = start_fetch(uri, target, log=subprocess.DEVNULL)
    try:
        assert server.stalled.wait(60)
        wait_for_bytes(target.with_name(f"{target.name}.partial"), received)
    finally:
        process.kill()
        process.wait()
    assert not target.exists()
    shutil.rmtree(target.parent / LOCKS)  # else the next one would give it a minute to show that it lives
    server.stall_after = -1
    server.requests.clear()


def start_fetch(uri: str, target: Path, *, log: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """In a process of its own, with a lock that is taken over after seconds."""
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_STEPS, "fetch", uri, str(target)],
        env={**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "60"},
        stdout=subprocess.DEVNULL,
        stderr=log,
        text=True,
    )


def wait_for_bytes(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):  # a file that became whole meanwhile
            if any(path.stat().st_size >= count for path in folder.glob(".download/*")):
                return
        time.sleep(0.02)
    raise AssertionError(f"no partial file of {count} bytes in {folder}")
