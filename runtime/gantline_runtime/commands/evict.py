"""Remove artefacts from a cache volume: those named, and nothing else. The operator's Job that makes room for another model.

Each vanishes at once, by a rename, and is deleted afterwards; one that some process makes at this moment is left alone, and so is one whose
owner does not let this user remove it. The answer names what is gone, what was left, and what the volume still has, half made or whole.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from gantline_runtime import logs, termination
from gantline_runtime.contents import list_contents
from gantline_runtime.errors import CapacityError, ConfigurationError
from gantline_runtime.shared_files import describe_owner, share_with_group
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
    share_with_group()
    gone = _evict_all(args.root, args.names)
    left = [name for name in args.names if name not in gone]
    artefact = {"kind": "evict", "evicted": gone, "left": left, **list_contents(args.root, _MAX_LISTED)}
    message = TerminationMessage(Reason.COMPLETED, f"Evicted {len(gone)} artefacts.", artefact=artefact)
    termination.write(message)
    print(f"Evicted {', '.join(gone) or 'nothing'}.")
    return termination.exit_code(message.reason)


def _evict_all(root: Path, names: Sequence[str]) -> list[str]:
    """Those that are gone. Raises CapacityError where all have to stay: another try at once would come to the same."""
    gone: list[str] = []
    refused: list[str] = []
    for name in names:
        try:
            if _evict(root, name):
                gone.append(name)
            else:
                refused.append(f"{name} is being made by a process")
        except PermissionError as error:
            refused.append(f"{name} cannot be removed by user {os.getuid()}, {describe_owner(Path(error.filename or root / name))}")
            log.warning("left alone", extra=logs.fields(name=name, cause=str(error)))
    if refused and not gone:
        raise CapacityError(
            f"the cache volume cannot be cleared: {refused[0]}", reason=Reason.DISK_FULL,
            cure="Wait for that process. Another user's files take a group that pods have, and its rights (chmod -R g+rwX).",
        )  # fmt: skip
    return gone


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
