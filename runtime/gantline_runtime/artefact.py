"""A folder that is either whole or not there: how fetch and quantize publish what they made.

    DST.partial/   filled, may be left behind by a killed process and picked up again
        │  every file and the folder fsynced, manifest written last
        └──rename──> DST/   with gantline-artefact.json: what it is, and of which inputs it was made

A process that finds DST with the same inputs has nothing to do; one that finds something else in its place refuses to touch it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from gantline_runtime.checkpoint.files import load_json
from gantline_runtime.errors import CapacityError, CheckpointError, ConfigurationError
from gantline_runtime.termination import Reason

__all__ = ["MANIFEST", "Manifest", "Staging", "find_artefact", "require_space", "sync"]

MANIFEST = "gantline-artefact.json"
_MAX_MANIFEST_BYTES = 1 << 18
_LOCK = ".gantline-lock"
_SPARE_BYTES = 64 << 20
"""Left free on the volume beside what is about to be written: file systems slow down or fail when the last block goes."""


@dataclass(frozen=True)
class Manifest:
    """What an artefact is. `inputs` decides whether it can be used again: equal inputs and version, equal artefact."""

    kind: str
    """`fetch` or `awq`."""
    algorithm_version: int
    inputs: Mapping[str, Any]
    bytes: int
    """Size of all files."""
    facts: Mapping[str, Any]
    perplexity: Mapping[str, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if value is not None and key != "extra"}
        return {**values, **self.extra}

    def made_of(self, kind: str, version: int, inputs: Mapping[str, Any]) -> bool:
        return (self.kind, self.algorithm_version, dict(self.inputs)) == (kind, version, dict(inputs))


def find_artefact(target: Path, kind: str, version: int, inputs: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a whole artefact at `target` that was made of the same inputs; None where nothing is there.

    Raises ConfigurationError where `target` holds anything else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    manifest = read_manifest(target)
    if manifest is not None and manifest.made_of(kind, version, inputs):
        return manifest
    what = "something else" if manifest is None else f"an artefact ({manifest.kind}) of other inputs"
    raise ConfigurationError(f"{target} exists and holds {what}", cure="Give another target, or move it away first.")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, or None where there is none that can be read."""
    try:
        path = folder / MANIFEST
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            return None
        values = load_json(path.read_bytes(), MANIFEST)
        known = {key: values[key] for key in ("kind", "algorithm_version", "inputs", "bytes", "facts")}
    except (OSError, KeyError, CheckpointError):
        return None
    if not isinstance(known["inputs"], dict) or not isinstance(known["facts"], dict):
        return None
    perplexity = values.get("perplexity")
    return Manifest(**known, perplexity=perplexity if isinstance(perplexity, dict) else None)


def require_space(folder: Path, needed: int, *, present: int = 0) -> None:
    """Raise CapacityError (DiskFull) unless `needed` bytes, of which `present` are already there, fit on the volume of `folder`."""
    free = shutil.disk_usage(_existing_parent(folder)).free
    missing = needed - present + _SPARE_BYTES - free
    if missing > 0:
        raise CapacityError(
            f"{folder} needs {_mebibytes(needed - present)} MiB more and its volume has {_mebibytes(free)} MiB free",
            reason=Reason.DISK_FULL,
            cure=f"Free {_mebibytes(missing)} MiB, or use a larger volume.",
        )


def _existing_parent(path: Path) -> Path:
    return path if path.exists() else _existing_parent(path.parent)


def _mebibytes(count: int) -> int:
    return -(-count // (1 << 20))


class Staging:
    """`TARGET.partial`, held by one process at a time.

    Leaving the `with` block without `publish()` keeps the folder, so that the next try can go on; `discard()` removes it.
    Disk-full errors inside the block become CapacityError.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        self._lock: IO[str] | None = None

    def __enter__(self) -> Staging:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("w")
        except OSError as error:
            raise _write_error(self.folder, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigurationError(f"another process is writing {self.target}", cure="Wait until it is done, or end it.") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # a volume that has no locks
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise _write_error(self.folder, error) from error

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove everything but the lock: what a former try left does not belong to this one."""
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def publish(self, manifest: Manifest) -> None:
        """Make the folder readable and durable, and give it its name. Raises ConfigurationError if the name was taken meanwhile."""
        (self.folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (self.folder / _LOCK).unlink(missing_ok=True)
        for path in sorted(self.folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync(path)
        self.folder.chmod(0o755)
        sync(self.folder)
        try:
            self.folder.rename(self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ConfigurationError(f"{self.target} appeared while it was made", cure="Give another target.") from error
            raise
        sync(self.target.parent)


def sync(path: Path) -> None:
    """Wait until a file's data, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def _write_error(folder: Path, error: OSError) -> CapacityError | ConfigurationError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(
            f"the volume of {folder} is full", reason=Reason.DISK_FULL, cure="Free some space or use a larger volume, then start again."
        )
    return ConfigurationError(f"{folder} cannot be written: {error.strerror}", cure="Give a target that this user may write.")
