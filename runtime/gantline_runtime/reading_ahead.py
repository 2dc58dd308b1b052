"""Having a checkpoint's files read from disk while Python imports: who loads them finds what has come by then in the page cache.

The kernel is asked, and reads by itself; files that are in its cache already cost it a look. Only what its cache has room for is asked for.
"""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

from gantline_runtime.memory import available_host_bytes

__all__ = ["begin_reading_ahead", "read_ahead"]


def begin_reading_ahead(folder: Path) -> threading.Thread:
    """`read_ahead` in a thread of its own, up to half of the memory that is left. Nobody needs to wait for it."""

    def work() -> None:
        with suppress(OSError):  # who loads the files says what is wrong with them
            read_ahead(folder, available_host_bytes() // 2)

    thread = threading.Thread(target=work, name="gantline-read-ahead", daemon=True)
    thread.start()
    return thread


def read_ahead(folder: Path, most_bytes: int) -> int:
    """Ask for the weights in `folder`, in the order in which they are loaded; returns the bytes asked for. Raises OSError."""
    asked = 0
    for path in sorted(folder.glob("*.safetensors")):
        if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe would notice that it is opened
            continue
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            length = min(os.fstat(descriptor).st_size, most_bytes - asked)
            if length > 0:
                os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_WILLNEED)
                asked += length
        finally:
            os.close(descriptor)
    return asked
