"""One maker at a time on a volume that several nodes may mount, by files alone: locks of network file systems cannot be relied on.

    ROOT/.gantline-locks/NAME.<n>        the highest n has the lock; its holder touches it every RENEW_S seconds
    ROOT/.gantline-locks/NAME.<n>.free   given back

      free, or not touched for STALE_S ──create NAME.<n+1>, exclusively──> held ──rename──> free

Who creates the next number has the lock: exclusive creation is decided by the file server, so of several that try one succeeds. A holder
that was killed touches nothing more. How long that takes is measured by the waiter's own clock alone, from one change of the file's time to
the next, and only while the volume answers: no clocks are compared, and a server that hangs makes nobody look dead. A holder that was only
asleep finds the next number when it wakes, and gives up (`LockLost`).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from gantline_runtime.errors import GantlineError
from gantline_runtime.termination import Reason

__all__ = ["LOCKS", "LockLost", "VolumeLock"]

LOCKS = ".gantline-locks"

RENEW_S = 5.0
STALE_S = 60.0
"""Twelve renewals: a node that is busy, or a volume that is slow, is not taken for dead."""
POLL_S = 2.0
_KEPT = 8
"""Old numbers that stay, so that one who looked long ago still finds its next number taken."""


class LockLost(GantlineError):
    """This process was thought dead, and another one has taken over; the artefact is that one's now."""

    reason = Reason.INTERNAL_ERROR


@dataclass(frozen=True)
class _State:
    """The highest number, whether it is free, and the time of its last touch in nanoseconds of the file server's clock."""

    number: int = 0
    free: bool = True
    touched_ns: int = 0


class VolumeLock:
    """The lock `name` under `root`. Held from `take` or `try_take` to `release`, or to the end of the process and STALE_S more."""

    def __init__(self, root: Path, name: str, *, lost: Callable[[], None] | None = None) -> None:
        """`lost` is called from another thread, once, when somebody else has taken over."""
        self._folder, self._name, self._on_lost = root / LOCKS, name, lost
        self._pattern = re.compile(re.escape(name) + r"\.(\d{1,9})(\.free)?")
        self._number = 0
        self._seen = _State()
        self._quiet_s = 0.0
        self._looked_at = 0.0
        self._lost = False
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None

    def take(self, waiting: Callable[[str], None] | None = None) -> None:
        """Waits as long as somebody else holds it; `waiting` is told the holder's name at each look."""
        while not self.try_take():
            if waiting is not None:
                waiting(self._holder())
            time.sleep(POLL_S)

    def try_take(self) -> bool:
        """True if it is ours now. False: another process holds it; whether that one lives is known after some calls only."""
        self._folder.mkdir(parents=True, exist_ok=True)
        state = self._look()
        if not (state.free or self._is_stale(state)):
            return False
        number = state.number + 1
        try:
            handle = os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o664)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as stream:
            stream.write(os.environ.get("HOSTNAME") or socket.gethostname())
        if self._look().number > number or self._taken(number + 1):
            self._path(number).unlink(missing_ok=True)
            return False
        self._number, self._lost = number, False
        self._sweep()
        self._renewer = threading.Thread(target=self._renew, name=f"lock-{self._name}", daemon=True)
        self._renewer.start()
        return True

    def check(self) -> None:
        """Raises LockLost where another process has taken over."""
        if self._lost or self._taken(self._number + 1):
            self._lost = True
            raise LockLost(f"another process has taken over {self._name}, since this one had stood still", cure="Start it again.")

    def release(self) -> None:
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join()
            self._renewer, self._stop = None, threading.Event()
            with contextlib.suppress(OSError):  # the folder is gone, or somebody has taken over: either way nobody waits for us
                self._path(self._number).rename(self._path(self._number, free=True))

    def __enter__(self) -> VolumeLock:
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    # ---- files

    def _path(self, number: int, *, free: bool = False) -> Path:
        return self._folder / f"{self._name}.{number}{'.free' if free else ''}"

    def _numbers(self) -> dict[int, bool]:
        """Number -> whether it is free."""
        found: dict[int, bool] = {}
        for name in os.listdir(self._folder):
            if match := self._pattern.fullmatch(name):
                number = int(match[1])
                found[number] = found.get(number, False) or bool(match[2])
        return found

    def _look(self) -> _State:
        numbers = self._numbers()
        if not numbers:
            return _State()
        number = max(numbers)
        if numbers[number]:
            return _State(number, True)
        try:
            with self._path(number).open("rb") as stream:  # opening makes a network file system ask its server
                return _State(number, False, os.fstat(stream.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return _State(number, True)

    def _taken(self, number: int) -> bool:
        return self._path(number).exists() or self._path(number, free=True).exists()

    def _holder(self) -> str:
        try:
            text = self._path(self._seen.number).read_text(encoding="utf-8", errors="replace")[:253]
        except OSError:
            return ""
        return "".join(char for char in text if char.isprintable())

    def _is_stale(self, state: _State) -> bool:
        """Counts the time during which the same state was seen; a look that came late counts as one that came in time."""
        now = time.monotonic()
        if state != self._seen:
            self._seen, self._quiet_s = state, 0.0
        else:
            self._quiet_s += min(now - self._looked_at, 2 * POLL_S)
        self._looked_at = now
        return self._quiet_s >= STALE_S

    def _sweep(self) -> None:
        for number, free in self._numbers().items():
            if number <= self._number - _KEPT:
                self._path(number, free=free).unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if not self._taken(self._number + 1):
                    os.utime(self._path(self._number))  # takes no block, so that a full volume cannot make its holder look dead
                    continue
            except FileNotFoundError:
                pass
            except OSError:
                continue  # the volume does not answer: nobody else sees it either
            self._lost = True
            if self._on_lost is not None:
                self._on_lost()
            return
