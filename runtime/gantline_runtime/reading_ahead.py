"""Reading a checkpoint's files from disk while Python imports: who loads them finds what has come by then in the page cache.

What is in the cache already is not read again, and no more than the cache has room for is read. (Asking the kernel to read ahead would be
less work, but it takes no more than a few MB of a request, and tens of thousands of them would wait for Python's lock each time.)
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

from gantline_runtime.memory import available_host_bytes

__all__ = ["ReadingAhead"]

_CHUNK_BYTES = 32 << 20
"""Large, since another thread may hold Python's lock for some milliseconds after each."""


class ReadingAhead:
    """Reads the weights in a folder, in the order in which they are loaded, in a thread of its own from now on, until `stop`."""

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        """Up to `most_bytes` (default: half of the memory that is left)."""
        self._folder, self._most_bytes = folder, most_bytes
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="gantline-read-ahead", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin no further read; whoever loads the files does it faster."""
        self._stopped = True

    def join(self) -> None:
        """Until it is done, or stopped."""
        self._thread.join()

    def _work(self) -> None:
        with suppress(OSError, ValueError, TypeError, KeyError):  # who loads the files says what is wrong with them
            left = available_host_bytes() // 2 if self._most_bytes is None else self._most_bytes
            for path in self._weights():
                if stat.S_ISREG(path.stat().st_mode):  # a device or a pipe would notice that it is opened
                    left -= self._read(path, left)

    def _weights(self) -> list[Path]:
        """What will be loaded: publishers put other copies beside it, such as Mistral's consolidated.safetensors."""
        from gantline_runtime.checkpoint.files import MAX_JSON_BYTES  # some 20 ms, which torch's import need not wait for
        from gantline_runtime.checkpoint.reader import INDEX, SINGLE

        paths = sorted(self._folder.glob("*.safetensors"))
        index = self._folder / INDEX
        if index.is_file() and index.stat().st_size <= MAX_JSON_BYTES:
            loaded = set(json.loads(index.read_bytes())["weight_map"].values())
        else:
            loaded = {SINGLE} if (self._folder / SINGLE).exists() else {path.name for path in paths}
        return [path for path in paths if path.name in loaded]

    def _read(self, path: Path, most_bytes: int) -> int:
        """Bytes of the file that are in the page cache now, or were before."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size, at = min(os.fstat(descriptor).st_size, most_bytes), 0
            with mmap.mmap(-1, _CHUNK_BYTES) as buffer, memoryview(buffer) as view:
                while at < size and not self._stopped:
                    length = min(_CHUNK_BYTES, size - at)
                    if not (_is_cached(descriptor, at) and _is_cached(descriptor, at + length - 1)):
                        os.preadv(descriptor, [view[:length]], at)
                    at += length
            return at
        finally:
            os.close(descriptor)


def _is_cached(descriptor: int, at: int) -> bool:
    """Whether the page of this byte is in memory; false where the file system cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return False
        raise
