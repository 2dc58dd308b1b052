"""What the server's processes have in common: a child dies with its parent, leaves signals to it, its end is noticed at once, and each
knows when it began."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

__all__ = ["became_process_at", "become_child", "wait_for_exit"]

_PR_SET_PDEATHSIG = 1


def become_child(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends, and ignore the signals that a terminal or an init process
    sends to all processes at once: the parent decides when this one ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def became_process_at(pid: int | None = None, *, proc: Path = Path("/proc")) -> float:
    """When process `pid` (default: this one) was started, on the clock of `time.monotonic`, to a hundredth of a second. Raises OSError."""
    text = (proc / ("self" if pid is None else str(pid)) / "stat").read_text()
    ticks = int(text.rpartition(")")[2].split()[19])  # the name before it, in parentheses, may hold anything
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age_s)


async def wait_for_exit(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a child as of `subprocess`, awaited without a thread and without polling."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    handle = os.pidfd_open(process.pid)
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    return process.wait()
