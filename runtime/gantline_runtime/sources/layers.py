"""A layer of an image or artifact, as a file that can be read anywhere without being downloaded: plain, or compressed with gzip.

A plain blob is read by ranges. A gzip stream has to be gone through from its start; on the way, copies of the decompressor are kept every
so often, so that later reads begin at the nearest one instead.
"""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gantline_runtime.errors import CheckpointError
from gantline_runtime.sources.patience import Service
from gantline_runtime.sources.transfer import OpenRange, read_range, stream_range

__all__ = ["GzipBlob", "PlainBlob", "open_layer"]

_AHEAD_BYTES = 1 << 16
_MAX_SNAPSHOTS = 512
_SNAPSHOT_EVERY_BYTES = 32 << 20
_STEP_BYTES = 1 << 20
_MAX_READ_BYTES = 64 << 20
"""tarfile reads an entry's long names and attributes whole, however long the archive says that they are."""
_GZIP = 16 + zlib.MAX_WBITS


def open_layer(service: Service, open_range: OpenRange, size: int, name: str) -> io.RawIOBase:
    """The layer's contents. Raises SourceError; CheckpointError for a compression that is not known here."""
    magic = read_range(service, open_range, 0, min(4, size))
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        raise CheckpointError(f"{name} is compressed with zstd, which is not read", cure="Push it uncompressed, or with gzip.")
    return GzipBlob(service, open_range, size) if magic.startswith(b"\x1f\x8b") else PlainBlob(service, open_range, size)


class _Blob(io.RawIOBase):
    """The part that tarfile needs: a position, and reading from it."""

    def __init__(self) -> None:
        super().__init__()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end is not known")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise CheckpointError(f"a layer has an entry with {size} bytes of names and attributes", cure="Push it again.")
        data = self.read_at(self._position, size)
        self._position += len(data)
        return data

    def read_at(self, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`: fewer only at the end."""
        raise NotImplementedError


class PlainBlob(_Blob):
    """Keeps the last piece that was read, since a tar's headers are small and often near each other."""

    def __init__(self, service: Service, open_range: OpenRange, size: int) -> None:
        super().__init__()
        self._service, self._open_range, self._size = service, open_range, size
        self._piece, self._piece_start = b"", 0

    def read_at(self, start: int, length: int) -> bytes:
        end = min(start + length, self._size)
        if start >= end:
            return b""
        if not (self._piece_start <= start and end <= self._piece_start + len(self._piece)):
            ahead = min(max(end, start + _AHEAD_BYTES), self._size)
            self._piece, self._piece_start = read_range(self._service, self._open_range, start, ahead - start), start
        return self._piece[start - self._piece_start : end - self._piece_start]


@dataclass(frozen=True)
class _Snapshot:
    """`decompressor` has made `made` bytes of the first `taken` of the blob. It is copied before use."""

    made: int
    taken: int
    decompressor: Any


class GzipBlob(_Blob):
    """One decompressor goes on as long as reads go forward; a read behind it begins at a snapshot."""

    def __init__(self, service: Service, open_range: OpenRange, size: int) -> None:
        super().__init__()
        self._service, self._open_range, self._size = service, open_range, size
        self._every = max(_SNAPSHOT_EVERY_BYTES, size // _MAX_SNAPSHOTS)
        self._snapshots = [_Snapshot(0, 0, zlib.decompressobj(_GZIP))]
        self._pieces: Iterator[bytes] = iter(())
        self._pending, self._pending_start = b"", 0
        self._begin(self._snapshots[0])

    def read_at(self, start: int, length: int) -> bytes:
        nearest = self._snapshots[bisect_right(self._snapshots, start, key=lambda snapshot: snapshot.made) - 1]
        live_end = self._pending_start + len(self._pending)
        if start < self._pending_start or nearest.made > live_end:
            self._begin(nearest)
        found = bytearray()
        while len(found) < length:
            skip = start + len(found) - self._pending_start
            if skip < len(self._pending):
                found += self._pending[skip : skip + length - len(found)]
            elif not self._step():
                break
        return bytes(found)

    def _begin(self, snapshot: _Snapshot) -> None:
        self._decompressor, self._taken = snapshot.decompressor.copy(), snapshot.taken
        self._pieces = stream_range(self._service, self._open_range, snapshot.taken, self._size)
        self._pending, self._pending_start = b"", snapshot.made
        self._ended = self._between = False

    def _step(self) -> bool:
        """Make the next bytes, in the place of those before. False at the end. Raises CheckpointError for what is no gzip stream."""
        self._pending_start += len(self._pending)
        self._pending = b""
        while not self._pending and not self._ended:
            rest = self._decompressor.unconsumed_tail
            if self._decompressor.eof:
                rest, self._between = self._decompressor.unused_data, True
                self._decompressor = zlib.decompressobj(_GZIP)
            if not rest:
                self._keep_snapshot()
                rest = next(self._pieces, b"")
                self._taken += len(rest)
                self._ended = not rest
            if self._between:  # a further member comes, of those that parallel compressors write, or zeros that fill a block up
                rest = rest.lstrip(b"\0")
                if not rest:
                    continue
                self._between = False
            self._pending = self._decompress(rest)
        return bool(self._pending)

    def _decompress(self, data: bytes) -> bytes:
        try:
            return bytes(self._decompressor.decompress(data, _STEP_BYTES) if data else self._decompressor.flush())
        except zlib.error:
            raise CheckpointError(f"a layer of {self._service.label} is no gzip stream", cure="Push it again.") from None

    def _keep_snapshot(self) -> None:
        """Where everything that was taken has been made into bytes, and the last snapshot is far away."""
        if not self._between and self._taken >= self._snapshots[-1].taken + self._every:
            self._snapshots.append(_Snapshot(self._pending_start, self._taken, self._decompressor.copy()))
