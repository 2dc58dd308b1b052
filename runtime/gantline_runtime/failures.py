"""Why something failed, in the closed vocabulary of `termination.Reason`: one table for exceptions, one rule for killed processes.

Imports neither torch nor any kernel library: they are recognised by the names of their exception classes and by their messages, so that
the API process and the command line can tell a CUDA failure from a bug without loading CUDA.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from gantline_runtime.errors import GantlineError
from gantline_runtime.termination import Reason, TerminationMessage

__all__ = ["OutOfMemoryKills", "describe_exception", "describe_exit", "is_fatal"]

_MAX_TEXT = 1000


def _is_cuda_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in str(error) or "CUDA error: out of memory" in str(error)


def _is_driver_too_old(error: BaseException) -> bool:
    text = str(error)
    return "driver on your system is too old" in text or "driver version is insufficient" in text


def _is_cuda_error(error: BaseException) -> bool:
    name = type(error).__name__
    return name in {"AcceleratorError", "CUDAError", "DistBackendError"} or any(
        t in str(error) for t in ("CUDA error", "CUBLAS_STATUS", "NCCL error")
    )


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (28, 122)  # ENOSPC, EDQUOT


def _is_allocation_failure(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


_TABLE: tuple[tuple[Callable[[BaseException], bool], Reason, str], ...] = (
    (
        _is_cuda_out_of_memory,
        Reason.CUDA_OUT_OF_MEMORY,
        "Lower cache_max_entry_count, max_prefill_token_num or session_len, or use more GPUs.",
    ),
    (_is_driver_too_old, Reason.DRIVER_TOO_OLD, "Update the NVIDIA driver of the node, or use an image built for an older CUDA."),
    (
        _is_cuda_error,
        Reason.CUDA_ERROR,
        "The process must be restarted; if it happens again, look for Xid errors in the node's kernel log.",
    ),
    (_is_allocation_failure, Reason.OUT_OF_MEMORY, "Give the process more memory, or lower session_len or cache_max_entry_count."),
    (_is_disk_full, Reason.DISK_FULL, "Free some space or use a larger volume."),
)
"""First match wins; the order matters, since an out-of-memory error of CUDA is a CUDA error too."""


def describe_exception(error: BaseException) -> TerminationMessage:
    """The termination message for `error`. What no row of the table knows is an InternalError: our own bug."""
    if isinstance(error, GantlineError):
        return TerminationMessage(error.reason, str(error)[:_MAX_TEXT], error.cure)
    text = f"{type(error).__name__}: {error}"[:_MAX_TEXT]
    for matches, reason, cure in _TABLE:
        if matches(error):
            return TerminationMessage(reason, text, cure)
    return TerminationMessage(Reason.INTERNAL_ERROR, text, "This is a defect of Gantline; please report it with the log.")


def is_fatal(error: Exception) -> bool:
    """Whether an engine whose step raised `error` cannot go on. A GPU in error stays so until its process ends, and a rank that is gone
    does not come back; running out of memory, or a shape that nobody foresaw, concerns the requests of that step alone."""
    return isinstance(error, GantlineError) or describe_exception(error).reason in (Reason.CUDA_ERROR, Reason.DRIVER_TOO_OLD)


def describe_exit(returncode: int, *, killed_for_memory: bool, what: str = "the engine process") -> TerminationMessage:
    """The termination message for a process that ended without a word. `returncode` as of `subprocess`: -9 is SIGKILL."""
    if returncode == -signal.SIGKILL and killed_for_memory:
        cure = "Give the container more memory, or lower session_len or cache_max_entry_count."
        return TerminationMessage(Reason.OUT_OF_MEMORY, f"{what} was killed because memory ran out", cure)
    if returncode < 0:
        name = signal.Signals(-returncode).name if -returncode in list(signal.Signals) else f"signal {-returncode}"
        return TerminationMessage(Reason.INTERNAL_ERROR, f"{what} was killed by {name}", "See the log for what happened before.")
    return TerminationMessage(Reason.INTERNAL_ERROR, f"{what} ended with exit code {returncode}", "See the log for the cause.")


class OutOfMemoryKills:
    """Counts processes that the kernel killed for memory in our cgroup since this object was made.

    Where no cgroup of ours counts them (no cgroup v2), the whole machine's counter is read instead.
    """

    def __init__(self, cgroup_root: Path = Path("/sys/fs/cgroup")) -> None:
        self._path = _memory_events(cgroup_root)
        self._before = self._read()

    def happened(self) -> bool:
        return self._read() > self._before

    def _read(self) -> int:
        try:
            fields = dict(line.split() for line in self._path.read_text().splitlines())
            return int(fields.get("oom_kill", 0))
        except (OSError, ValueError):
            return 0


def _memory_events(root: Path) -> Path:
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        candidates = [root / line[3:].strip("/") / "memory.events", root / "memory.events"]
    except (OSError, StopIteration):
        candidates = [root / "memory.events"]
    return next((path for path in candidates if os.access(path, os.R_OK)), Path("/proc/vmstat"))
