"""Processes for the ranks of a tensor-parallel engine other than 0, started before anything heavy is imported, so that all ranks import
at once. What they do then is in `rank_process.py` and `distributed.py`.

To each leads a pipe, which ends it when it closes; a rank's end is noticed by its pidfd, which `multiprocessing.connection.wait` takes.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import subprocess
import sys
from dataclasses import dataclass

__all__ = ["RankProcess", "Ranks"]

_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RankProcess:
    rank: int
    process: subprocess.Popen[bytes]
    pipe: multiprocessing.connection.Connection
    """Messages are pickled: only this process and its own child write to it."""
    pidfd: int
    """Readable once the process has ended."""


class Ranks:
    """Ranks 1 to `size` - 1, which import and then wait for a `WorkerPlan`."""

    def __init__(self, size: int, device: str = "auto") -> None:
        """`device` as `EngineConfig.device`: each rank opens its GPU meanwhile."""
        self.processes: list[RankProcess] = []
        try:
            for rank in range(1, size):
                self.processes.append(_start(rank, device))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the pipes, which ends whoever waits at one, and kill who goes on."""
        for item in self.processes:
            item.pipe.close()
        for item in self.processes:
            try:
                item.process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                item.process.kill()
                item.process.wait()

    def forget(self) -> None:
        """After `close`, once nobody waits for their ends any more."""
        while self.processes:
            os.close(self.processes.pop().pidfd)


def _start(rank: int, device: str) -> RankProcess:
    ours, theirs = multiprocessing.connection.Pipe()
    arguments = [str(rank), str(theirs.fileno()), str(os.getpid()), device]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gantline_runtime.rank_process", *arguments],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},  # also what a program has added itself
    )
    theirs.close()
    return RankProcess(rank, process, ours, os.pidfd_open(process.pid))
