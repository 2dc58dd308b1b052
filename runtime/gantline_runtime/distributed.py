"""The other ranks of a tensor-parallel engine: processes that load their part, then repeat every step that rank 0 sends.

Rank 0 lives in the engine's own process; `ranks.py` has started the others. To each worker leads a pipe: control messages (pickled by our
own parent, never by a peer) at the start, then one packed batch a step. Results need no way back: rank 0 samples, and the tokens reach the
others as a collective. A worker ends when its pipe closes, so none outlives rank 0; rank 0 learns of a dead worker from its pidfd.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gantline_runtime.batch import BatchLimits, BatchShape
from gantline_runtime.checkpoint import open_checkpoint
from gantline_runtime.device_memory import free_bytes
from gantline_runtime.errors import GantlineError
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.model_runner import ModelRunner
from gantline_runtime.parallel import Parallel
from gantline_runtime.ranks import Ranks
from gantline_runtime.termination import Reason

__all__ = ["RankError", "WorkerGroup", "WorkerPlan", "join_group", "leave_group", "make_rendezvous", "serve_rank"]

_SHAPE_WORDS = len(BatchShape._fields) + len(BatchShape._fields) % 2
"""Header of a step: the fields of BatchShape, rounded up to an even number, since the batch begins with 64-bit words."""
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=5)


class RankError(GantlineError):
    """A rank other than 0 failed or died; the engine cannot go on without it."""


@dataclass(frozen=True)
class WorkerPlan:
    """What a rank needs to know to build its part; the same on all."""

    model_dir: str
    session_len: int
    dtype: torch.dtype
    device_type: str
    backend: str
    size: int
    rendezvous: str
    num_threads: int
    graphs: bool

    def device(self, rank: int) -> torch.device:
        return torch.device("cuda", rank) if self.device_type == "cuda" else torch.device("cpu")

    def build(self, rank: int) -> BuildContext:
        return BuildContext(dtype=self.dtype, device=self.device(rank), backend=self.backend)


def join_group(plan: WorkerPlan, rank: int) -> Parallel:
    """Make this process rank `rank` of the group: NCCL between GPUs, gloo over the loopback device between CPU processes."""
    if plan.size == 1:
        return Parallel()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if plan.device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if plan.device_type == "cuda" else "gloo",
        init_method=f"file://{plan.rendezvous}",
        rank=rank,
        world_size=plan.size,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    return Parallel(rank=rank, size=plan.size)


def leave_group(parallel: Parallel) -> None:
    if parallel.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


class WorkerGroup:
    """Rank 0's handle on ranks 1 and up. Every method but `close` raises RankError when one of them is gone."""

    def __init__(self, plan: WorkerPlan, ranks: Ranks | None = None) -> None:
        """`ranks`, from now on this group's, may be on their way already; None starts them."""
        self._ranks = ranks or Ranks(plan.size, plan.device_type)
        self._pipes = [item.pipe for item in self._ranks.processes]
        self._closing = False
        self._rendezvous = plan.rendezvous
        self.failure: str | None = None
        self._watcher = threading.Thread(target=self._watch, name="gantline-rank-watch", daemon=True)
        self._watcher.start()
        try:
            self.send(plan)
        except BaseException:
            self.close()
            raise

    def gather(self) -> list[Any]:
        """One control message from each rank. Raises what a rank reports as its error."""
        return [self._receive(rank, pipe) for rank, pipe in enumerate(self._pipes, 1)]

    def send(self, message: Any) -> None:
        for pipe in self._pipes:
            self._guarded(pipe.send, message)

    def send_step(self, shape: BatchShape, words: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        header = np.zeros(_SHAPE_WORDS, dtype=np.int32)
        header[: len(shape)] = shape
        data = header.tobytes() + words.tobytes()
        for pipe in self._pipes:
            self._guarded(pipe.send_bytes, data)

    def check(self) -> None:
        """Raise RankError if a rank has died, with what it reported last if it could."""
        if self.failure is not None:
            raise RankError(self.failure, cure="The engine must be started again; see the log of the rank that ended.")

    def check_soon(self, timeout_s: float = 2.0) -> None:
        """After a collective failed: wait a little for the death that caused it to become known, then raise RankError if there was one."""
        multiprocessing.connection.wait([item.pidfd for item in self._ranks.processes], timeout=timeout_s)
        self._watcher.join(timeout=timeout_s)
        self.check()

    def close(self) -> None:
        self._closing = True
        self._ranks.close()
        self._watcher.join()
        self._ranks.forget()
        shutil.rmtree(Path(self._rendezvous).parent, ignore_errors=True)

    def _watch(self) -> None:
        ready = multiprocessing.connection.wait([item.pidfd for item in self._ranks.processes])
        if self._closing:
            return
        for item in self._ranks.processes:
            if item.pidfd in ready:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    item.process.wait(1.0)
                self.failure = f"rank {item.rank} {_last_words(item.pipe) or _describe_exit(item.process.returncode)}"
                return

    def _receive(self, rank: int, pipe: multiprocessing.connection.Connection) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self.check_soon()
            raise RankError(f"rank {rank} closed its pipe", cure="See the log of that rank.") from None
        if isinstance(message, _Failure):
            raise RankError(f"rank {rank}: {message.message}", reason=message.reason, cure=message.cure)
        return message

    def _guarded(self, function: Any, argument: Any) -> None:
        self.check()
        try:
            function(argument)
        except OSError:
            self.check_soon()
            raise


@dataclass(frozen=True)
class _Failure:
    reason: Reason
    message: str
    cure: str


def _last_words(pipe: multiprocessing.connection.Connection) -> str:
    """The error that a rank which has ended reported, if any."""
    try:
        while pipe.poll():
            message = pipe.recv()
            if isinstance(message, _Failure):
                return f"failed: {message.message}"
    except (EOFError, OSError):
        pass
    return ""


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", perhaps out of memory" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"
    return f"ended unexpectedly with exit code {code}"


def serve_rank(rank: int, pipe: multiprocessing.connection.Connection) -> None:
    """What a rank's process does once it has imported: it ends in here."""
    try:
        plan = pipe.recv()
        assert isinstance(plan, WorkerPlan)
        torch.set_num_threads(plan.num_threads)
        _serve_steps(rank, plan, pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # rank 0 is gone, or done
    except Exception as error:
        traceback.print_exc()
        _report(pipe, error)
        os._exit(1)  # the interpreter's ordinary end would wait in the process group's destructor
    os._exit(0)


def _serve_steps(rank: int, plan: WorkerPlan, pipe: multiprocessing.connection.Connection) -> None:
    pipe.send(None)  # imports are done; joining can be waited for
    parallel = join_group(plan, rank)
    runner = ModelRunner(open_checkpoint(plan.model_dir), session_len=plan.session_len, build=plan.build(rank), parallel=parallel)
    limits, block_size = pipe.recv()
    assert isinstance(limits, BatchLimits)
    workspace = runner.measure_workspace(limits, block_size, graphs=plan.graphs)
    runner.wait_loaded()
    pipe.send(free_bytes(plan.device(rank), shared_by=plan.size) - workspace)
    num_blocks, limits = pipe.recv()
    runner.allocate(num_blocks, block_size, limits, graphs=plan.graphs)
    pipe.send(None)
    while True:
        words = torch.frombuffer(bytearray(pipe.recv_bytes()), dtype=torch.int32)
        shape = BatchShape(*words[: len(BatchShape._fields)].tolist())
        runner.execute(words[_SHAPE_WORDS:], shape, None)


def _report(pipe: multiprocessing.connection.Connection, error: Exception) -> None:
    failure = _Failure(Reason.INTERNAL_ERROR, f"{type(error).__name__}: {error}"[:500], "")
    if isinstance(error, GantlineError):
        failure = _Failure(error.reason, str(error), error.cure)
    with contextlib.suppress(OSError):
        pipe.send(failure)


def make_rendezvous() -> str:
    """A fresh file name for the group's first meeting, in a folder of its own that `WorkerGroup.close` removes."""
    return str(Path(tempfile.mkdtemp(prefix="gantline-ranks-")) / "store")
