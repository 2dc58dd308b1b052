"""What a person sees while a model loads: a bar on a terminal, a line for every tenth elsewhere."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

from gantline_runtime import logs

__all__ = ["LoadingDisplay"]

_LOGGED_SHARE = 0.1

log = logging.getLogger("gantline.load")


class LoadingDisplay:
    """Feed it an engine's progress: objects with `phase`, `done` and `total` (0: unknown; bytes for `weights`)."""

    def __init__(self, *, bar: bool | None = None) -> None:
        """`bar`: whether to draw one; by default only on a terminal."""
        self._draws = sys.stderr.isatty() if bar is None else bar
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._logged = 0.0

    def __enter__(self) -> LoadingDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def show(self, progress: Any) -> None:
        if self._draws:
            self._draw(progress)
        else:
            self._log(progress)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, progress: Any) -> None:
        if progress.phase != self._phase:
            self.close()
            self._phase = progress.phase
            form: dict[str, Any] = {} if progress.total else {"bar_format": "loading: {desc} ..."}
            if progress.phase == "weights":
                form.update(unit="B", unit_scale=True, unit_divisor=1024)
            self._bar = tqdm(total=progress.total or None, desc=progress.phase, leave=False, dynamic_ncols=True, file=sys.stderr, **form)
        assert self._bar is not None
        self._bar.update(progress.done - self._bar.n)

    def _log(self, progress: Any) -> None:
        share = progress.done / progress.total if progress.total else 0.0
        if progress.phase != self._phase or share >= self._logged + _LOGGED_SHARE:
            self._phase, self._logged = progress.phase, share
            log.info("loading", extra=logs.fields(phase=progress.phase, progress=round(share, 2) if progress.total else None))
