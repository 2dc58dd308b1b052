"""Whatever ends a process gets a reason of the closed set."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from gantline_runtime.errors import CapacityError, CheckpointError
from gantline_runtime.failures import OutOfMemoryKills, describe_exception, describe_exit
from gantline_runtime.termination import Reason


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class AcceleratorError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CheckpointError("x", reason=Reason.UNSAFE_WEIGHTS), Reason.UNSAFE_WEIGHTS),
        (CapacityError("x"), Reason.OUT_OF_MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Reason.CUDA_OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), Reason.CUDA_OUT_OF_MEMORY),
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), Reason.CUDA_ERROR),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), Reason.CUDA_ERROR),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"), Reason.DRIVER_TOO_OLD),
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), Reason.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), Reason.DISK_FULL),
        (ValueError("our own bug"), Reason.INTERNAL_ERROR),
    ],
)
def test_every_exception_has_a_reason(error: Exception, reason: Reason) -> None:
    message = describe_exception(error)
    assert message.reason is reason
    assert message.message and (message.cure or isinstance(error, (CheckpointError, CapacityError)))


@pytest.mark.parametrize(
    ("returncode", "memory", "reason", "text"),
    [
        (-9, True, Reason.OUT_OF_MEMORY, "memory ran out"),
        (-9, False, Reason.INTERNAL_ERROR, "SIGKILL"),
        (-11, True, Reason.INTERNAL_ERROR, "SIGSEGV"),
        (-99, False, Reason.INTERNAL_ERROR, "signal 99"),
        (3, False, Reason.INTERNAL_ERROR, "exit code 3"),
    ],
)
def test_a_process_that_ended_without_a_word_is_described_by_its_exit_code(
    returncode: int, memory: bool, reason: Reason, text: str
) -> None:
    message = describe_exit(returncode, killed_for_memory=memory)
    assert message.reason is reason and text in message.message


def test_kills_for_memory_are_counted_from_the_cgroup(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 1\n")
    kills = OutOfMemoryKills(tmp_path)
    assert not kills.happened()
    events.write_text("low 0\noom 4\noom_kill 2\n")
    assert kills.happened()
