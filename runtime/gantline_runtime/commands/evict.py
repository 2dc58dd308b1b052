"""Remove artefacts from a cache volume: those named, and nothing else. The operator's Job that makes room for another model.

Each vanishes at once, by a rename, and is deleted afterwards; one that some process makes at this moment is left alone. The answer names
what is gone, what was left, and what the volume still has, half made or whole.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import time
import uuid
from pathlib import Path

from gantline_runtime import logs, termination
from gantline_runtime.contents import list_contents
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.termination import Reason, TerminationMessage
from gantline_runtime.volume_lock import POLL_S, STALE_S, VolumeLock

__all__ = ["add_arguments", "run"]

log = logging.getLogger("gantline.evict")

_NAME = re.compile(r"[a-z0-9]{1,16}-[0-9a-f]{10}")
_MOVED = ".gantline-evicted"
_MAX_LISTED = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", type=Path, help="the cache volume")
    parser.add_argument("names", metavar="NAME", nargs="*", help="artefacts by the names of their folders; without: only look")


def run(args: argparse.Namespace) -> int:
    logs.configure("info", "auto")
    for name in args.names:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name!r} is no artefact's name", cure="Give names such as fetch-0123456789.")
    if not args.root.is_dir():
        raise ConfigurationError(f"{args.root} is no folder", cure="Give the folder where the cache volume is mounted.")
    shutil.rmtree(args.root / _MOVED, ignore_errors=True)  # what a killed eviction left
    gone = [name for name in args.names if _evict(args.root, name)]
    left = [name for name in args.names if name not in gone]
    artefact = {"kind": "evict", "evicted": gone, "left": left, **list_contents(args.root, _MAX_LISTED)}
    message = TerminationMessage(Reason.COMPLETED, f"Evicted {len(gone)} artefacts.", artefact=artefact)
    termination.write(message)
    print(f"Evicted {', '.join(gone) or 'nothing'}.")
    return termination.exit_code(message.reason)


def _evict(root: Path, name: str) -> bool:
    """Whether it is gone. False where a process makes it, which is waited for until it would count as dead."""
    lock = VolumeLock(root, name)
    deadline = time.monotonic() + STALE_S + 5 * POLL_S
    while not lock.try_take():
        if time.monotonic() > deadline:
            log.warning("left alone, since a process makes it", extra=logs.fields(name=name))
            return False
        time.sleep(POLL_S)
    try:
        for folder in (root / name, root / f"{name}.partial"):
            if folder.is_dir():
                _remove(root, folder)
    finally:
        lock.release()
    log.info("evicted", extra=logs.fields(name=name))
    return True


def _remove(root: Path, folder: Path) -> None:
    moved = root / _MOVED / f"{folder.name}-{uuid.uuid4().hex[:8]}"
    moved.parent.mkdir(exist_ok=True)
    folder.rename(moved)
    shutil.rmtree(moved)
