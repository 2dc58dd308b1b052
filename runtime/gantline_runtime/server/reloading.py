"""Files that may change while the server runs: API keys and certificates, as Kubernetes renews mounted Secrets in place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gantline_runtime import logs

__all__ = ["Reloader"]

log = logging.getLogger("gantline.server")


@dataclass
class _Watched:
    paths: Sequence[Path]
    reload: Callable[[], None]
    seen: tuple[object, ...] = field(default=())


class Reloader:
    """Calls `reload` within `period_s` of a change. What it raises is logged, and the old content stays in use."""

    def __init__(self, period_s: float = 2.0) -> None:
        self._period_s = period_s
        self._watched: list[_Watched] = []

    def watch(self, paths: Sequence[Path], reload: Callable[[], None]) -> None:
        """The content of `paths` is in use already."""
        self._watched.append(_Watched(paths, reload, _fingerprint(paths)))

    async def run(self) -> None:
        """Until cancelled."""
        while self._watched:
            await asyncio.sleep(self._period_s)
            for watched in self._watched:
                self._look(watched)

    def _look(self, watched: _Watched) -> None:
        try:
            now = _fingerprint(watched.paths)
        except OSError:  # it is being replaced at this moment
            return
        if now == watched.seen:
            return
        watched.seen = now
        fields = logs.fields(paths=[str(path) for path in watched.paths])
        try:
            watched.reload()
        except Exception as error:
            log.error(
                "a changed file cannot be used; the old content stays in use", extra=logs.fields(cause=str(error), **fields["fields"])
            )
        else:
            log.info("a changed file was loaded", extra=fields)


def _fingerprint(paths: Sequence[Path]) -> tuple[object, ...]:
    """Changes with any file's content, and with what a folder holds. Links are followed: through them a mounted Secret is replaced."""
    return tuple(_stat(file) for path in paths for file in ([path, *sorted(path.iterdir())] if path.is_dir() else [path]))


def _stat(path: Path) -> tuple[str, int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size
