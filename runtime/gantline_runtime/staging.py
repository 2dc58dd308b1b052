"""Reading weights into GPU memory: threads, each with two pinned buffers and a stream of its own.

    file --preadv--> pinned buffer --copy engine--> (device buffer --convert, stride-->) destination

While one buffer is on its way to the device the next is read, so that disk (or page cache), bus and device work at once, beside whatever
else is done with the device meanwhile: memory there is taken before the first byte is read, and none later. Where a rank needs only some
columns of a matrix, rows are cut while they are copied from a mapping, and nothing else of the file is read.
"""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from gantline_runtime.errors import CheckpointError
from gantline_runtime.memory import available_cpus

__all__ = ["Piece", "PieceFiles", "StagedTransfers", "Transfer", "pieces_of"]

_BUFFER_BYTES = 16 << 20
_MAX_THREADS = 16
_SWITCH_S = 2e-4
"""After which Python lets another thread run. A reader needs the interpreter for microseconds and several times a piece; the usual 5 ms for
each, beside a thread that computes in Python, would make it wait longer than it reads."""


@dataclass(frozen=True)
class Transfer:
    """`destination` receives `tensor[source]` of the tensor of `shape` and `dtype` that begins at byte `start` of the file."""

    name: str
    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: tuple[slice, ...]
    destination: torch.Tensor

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""
        return self.destination.numel() * self.dtype.itemsize

    def check_length(self, file_bytes: int) -> None:
        """Raise CheckpointError if the file ends before the tensor does."""
        missing = self.start + self.num_elements * self.dtype.itemsize - file_bytes
        if missing > 0:
            raise CheckpointError(
                f"{self.path.name!r} is truncated: tensor {self.name!r} ends {missing} bytes past its end",
                cure="Copy or download the file again.",
            )


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `last` (of the destination) of a transfer: what fits into a buffer."""

    transfer: Transfer
    first: int
    last: int

    @property
    def row_bytes(self) -> int:
        return self.transfer.destination[0].numel() * self.transfer.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return (self.last - self.first) * self.row_bytes

    @property
    def destination(self) -> torch.Tensor:
        return self.transfer.destination[self.first : self.last]

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are the destination's, one after the other: else they are converted, or spread out, on the device."""
        return self.destination.is_contiguous() and self.destination.dtype == self.transfer.dtype


class StagedTransfers:
    """Transfers under way, to destinations that all lie on one GPU."""

    def __init__(self, transfers: list[Transfer]) -> None:
        """They begin at once. Until `wait` has returned destinations hold whatever has come so far."""
        device = transfers[0].destination.device
        torch.cuda.current_stream(device).synchronize()  # what was written to the destinations before must not come after
        pieces = [piece for transfer in transfers for piece in pieces_of(transfer)]
        count = max(1, min(_MAX_THREADS, available_cpus(), len(pieces)))
        scratch_bytes = max((piece.num_bytes for piece in pieces if not piece.is_plain), default=0)
        self._readers = [_Reader(device, scratch_bytes) for _ in range(count)]
        self._idle: queue.SimpleQueue[_Reader] = queue.SimpleQueue()
        for reader in self._readers:
            self._idle.put(reader)
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._pool = ThreadPoolExecutor(count, "gantline-load", initializer=torch.cuda.set_device, initargs=(device,))
        self._moved = [self._pool.submit(self._move, piece) for piece in pieces]

    def _move(self, piece: Piece) -> int:
        reader = self._idle.get()
        try:
            reader.move(piece)
        finally:
            self._idle.put(reader)
        return piece.num_bytes

    def wait(self, advance: Callable[[int], None]) -> None:
        """Until every destination is full; `advance` hears of bytes read, from this thread. Raises CheckpointError. To be called once."""
        try:
            for future in as_completed(self._moved):
                advance(future.result())
            for reader in self._readers:
                reader.synchronize()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Read nothing more; returns when nothing is being read. Does nothing after `wait`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        sys.setswitchinterval(self._switch_s)
        for reader in self._readers:
            reader.files.close()
        self._readers.clear()


def pieces_of(transfer: Transfer) -> Iterator[Piece]:
    """The transfer in pieces that fit into a buffer (or of one row, where a row does not)."""
    rows = len(transfer.destination)
    if not transfer.destination.numel():
        return
    row_bytes = transfer.destination[0].numel() * transfer.dtype.itemsize
    step = max(1, _BUFFER_BYTES // row_bytes)
    for first in range(0, rows, step):
        yield Piece(transfer, first, min(first + step, rows))


class _Reader:
    """A way to the device, for one piece at a time: two pinned buffers, a stream, and where it is needed a buffer on the device."""

    def __init__(self, device: torch.device, scratch_bytes: int) -> None:
        self.files = PieceFiles()
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._events = [torch.cuda.Event(), torch.cuda.Event()]
        self._next = 0
        self._scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)

    def move(self, piece: Piece) -> None:
        index, self._next = self._next, 1 - self._next
        buffer = self._buffers[index]
        if buffer is None or len(buffer) < piece.num_bytes:
            buffer = self._buffers[index] = torch.empty(max(_BUFFER_BYTES, piece.num_bytes), dtype=torch.uint8, pin_memory=True)
        self._events[index].synchronize()  # the copy that read this buffer last is over
        filled = buffer[: piece.num_bytes]
        self.files.read(piece, filled)
        destination = piece.destination
        with torch.cuda.stream(self._stream):
            if not piece.is_plain:
                filled = self._scratch[: piece.num_bytes].copy_(filled, non_blocking=True)
            destination.copy_(filled.view(piece.transfer.dtype).view(destination.shape), non_blocking=True)
            self._events[index].record(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()


class PieceFiles:
    """Reads pieces, packed, into host memory; keeps its files open."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._mappings: dict[Path, np.memmap[tuple[int], np.dtype[np.uint8]]] = {}

    def read(self, piece: Piece, filled: torch.Tensor) -> None:
        """The piece's bytes into `filled`, uint8 of just that size. Raises CheckpointError."""
        transfer = piece.transfer
        row = transfer.source[0].start + piece.first
        columns = transfer.source[1:]
        if all(part.stop - part.start == size for part, size in zip(columns, transfer.shape[1:], strict=True)):
            self._read_range(transfer, transfer.start + row * piece.row_bytes, filled)
        else:
            matrix = self._matrix(transfer)[row : row + piece.last - piece.first, columns[0]]
            np.copyto(filled.view(_VIEWS[transfer.dtype.itemsize][1]).numpy().reshape(matrix.shape), matrix)

    def _read_range(self, transfer: Transfer, start: int, filled: torch.Tensor) -> None:
        view, done = memoryview(filled.numpy()), 0
        descriptor = self._open(transfer)
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], start + done)
            except OSError as error:
                raise _unreadable(transfer, error) from None
            if count == 0:
                transfer.check_length(os.fstat(descriptor).st_size)
                raise CheckpointError(f"{transfer.path.name!r} ends too early", cure="Copy or download the file again.")
            done += count

    def _open(self, transfer: Transfer) -> int:
        if transfer.path not in self._descriptors:
            try:
                self._descriptors[transfer.path] = os.open(transfer.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _unreadable(transfer, error) from None
        return self._descriptors[transfer.path]

    def _matrix(self, transfer: Transfer) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        """The whole stored matrix, mapped."""
        transfer.check_length(os.fstat(self._open(transfer)).st_size)
        if transfer.path not in self._mappings:
            self._mappings[transfer.path] = np.memmap(transfer.path, dtype=np.uint8, mode="r")
        raw = self._mappings[transfer.path][transfer.start : transfer.start + transfer.num_elements * transfer.dtype.itemsize]
        return raw.view(_VIEWS[transfer.dtype.itemsize][0]).reshape(transfer.shape)

    def close(self) -> None:
        self._mappings.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _unreadable(transfer: Transfer, error: OSError) -> CheckpointError:
    cause = f"{transfer.path.name!r} cannot be read at tensor {transfer.name!r}: {error.strerror or error}"
    return CheckpointError(cause, cure="Check permissions and the volume.")


_VIEWS = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16), 4: (np.uint32, torch.uint32)}
"""Types to move elements of so many bytes with: numpy knows no bfloat16."""
