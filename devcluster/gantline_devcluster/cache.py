"""Where built binaries live: `${GANTLINE_CACHE:-~/.cache/gantline}`, outside the tree, keyed by what they are made from."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gantline_devcluster.errors import DevclusterError

LOCK_POLL_S = 1.0


def cache_root() -> Path:
    """The cache's folder, made if need be. Raises DevclusterError where it cannot be written."""
    root = Path(os.environ.get("GANTLINE_CACHE") or Path.home() / ".cache/gantline").expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DevclusterError(
            f"the cache {root} cannot be made: {error.strerror}", "Set GANTLINE_CACHE to a folder that you may write"
        ) from error
    return root


@contextlib.contextmanager
def locked(path: Path, satisfied: Callable[[], bool], waiting: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock file `path`; yields True with the lock, or False once another holder has made `satisfied()` true meanwhile.

    `waiting` is told once, with the holder's process id, that somebody else works on it. The kernel drops the lock with its holder, so
    none is ever stale.
    """
    told = False
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if satisfied():
                    yield False
                    return
                if not told:
                    file.seek(0)
                    waiting(file.read().strip() or "unknown")
                    told = True
                time.sleep(LOCK_POLL_S)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield not satisfied()
