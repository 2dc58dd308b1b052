"""Bytes from a server that answers range requests: pieces of files, and whole files that outlive the process that fetches them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from pathlib import Path

from gantline_runtime.progress import Progress
from gantline_runtime.sources.patience import Interrupted, Patience, Service, Trouble

__all__ = ["Downloaded", "OpenRange", "download_all", "read_range", "resume_file", "stream_range"]

_STREAMS = 4
"""Files fetched at once: one connection seldom fills a line, and the files of a large model are many."""

OpenRange = Callable[[int, int], AbstractContextManager[Iterable[bytes]]]
"""Opens bytes `start` to `end`; opening and reading raise Refused and Interrupted."""


class Downloaded:
    """Bytes of all files so far. Any thread may add."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._bytes, self._present, self._lock = progress, 0, 0, threading.Lock()
        self.cancelled = threading.Event()

    def found(self, count: int) -> None:
        """So many bytes were there already."""
        with self._lock:
            self._bytes, self._present = self._bytes + count, self._present + count
            if count:
                self._progress.skip(self._present, self._bytes)

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            self._progress.show("fetching", self._bytes)


def stream_range(service: Service, open_range: OpenRange, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end`, across as many connections as it takes. Raises SourceError."""
    patience, position = Patience(service), start
    while position < end:
        try:
            with open_range(position, end) as pieces:
                for piece in pieces:
                    piece = piece[: end - position]
                    if not piece:
                        break
                    position += len(piece)
                    patience.progressed()
                    yield piece
            if position < end:
                raise Interrupted("the answer ended too early")
        except Trouble as trouble:
            patience.failed(trouble)


def read_range(service: Service, open_range: OpenRange, start: int, length: int) -> bytes:
    """Exactly `length` bytes from `start`. Raises SourceError."""
    return b"".join(stream_range(service, open_range, start, start + length))


def resume_file(service: Service, open_range: OpenRange, path: Path, size: int, downloaded: Downloaded) -> None:
    """Fill `path` up to `size` bytes, going on with what is there. Unbuffered: what was received outlives a SIGKILL. Raises SourceError."""
    path.parent.mkdir(exist_ok=True)
    with path.open("ab", buffering=0) as stream:
        if stream.tell() > size:
            stream.truncate(0)
            stream.seek(0)
        present = stream.tell()
        downloaded.found(present)
        for piece in stream_range(service, open_range, present, size):
            _write_all(stream.write, piece)
            downloaded.add(len(piece))
            if downloaded.cancelled.is_set():
                return


def _write_all(write: Callable[[memoryview], int | None], piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[write(rest) or 0 :]


def download_all(jobs: Iterable[Callable[[], None]], downloaded: Downloaded) -> None:
    """Run `jobs`, a few at once; the first that fails stops the others and is raised."""
    with ThreadPoolExecutor(max_workers=_STREAMS, thread_name_prefix="gantline-fetch") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            if waiting:
                next(future for future in done if future.exception()).result()
        except BaseException:
            downloaded.cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for future in futures:
            future.result()
