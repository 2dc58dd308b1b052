"""How far a long command has come: a bar with the time left on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from gantline_runtime import logs

__all__ = ["Progress"]

_LOGGED_SHARE = 0.05
_LOGGED_EVERY_S = 15.0


class Progress:
    """`done` of `total`; log lines come for every twentieth of the whole, and at least every 15 seconds while `show` is called."""

    def __init__(self, logger: logging.Logger, total: float, *, unit: str = "", bar: bool | None = None, **fields: Any) -> None:
        """`unit` B counts bytes. `fields` stand in each log line. `bar`: whether to draw one; by default only on a terminal."""
        self._log, self._total, self._fields = logger, max(total, 1e-9), fields
        self._began = self._logged_at = time.monotonic()
        self._logged_share, self._started_with = -1.0, 0.0
        scale = (
            {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
            if unit == "B"
            else {"bar_format": "{l_bar}{bar}| {elapsed}<{remaining}"}
        )
        draws = sys.stderr.isatty() if bar is None else bar
        self._bar: tqdm[Any] | None = tqdm(total=total, file=sys.stderr, dynamic_ncols=True, leave=False, **scale) if draws else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def skip(self, done: float, so_far: float | None = None) -> None:
        """`done` was there at the start, of `so_far` (default: all of it): it does not count when the time left is estimated."""
        self._started_with = done
        self.show("resuming", done if so_far is None else so_far)

    def show(self, what: str, done: float) -> None:
        if self._bar is not None:
            self._bar.set_description(what, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        share, now = min(done / self._total, 1.0), time.monotonic()
        if share < 1 and share < self._logged_share + _LOGGED_SHARE and now < self._logged_at + _LOGGED_EVERY_S:
            return
        self._logged_at, self._logged_share = now, share
        self._log.info(what, extra=logs.fields(progress=round(share, 3), eta_s=self._eta(done, now), **self._fields))

    def _eta(self, done: float, now: float) -> int | None:
        """Seconds left at the speed so far, or None while nothing is known."""
        made = done - self._started_with
        return round((self._total - done) * (now - self._began) / made) if made > 0 else None
