"""A folder that is either whole or not there: how fetch and quantize publish what they made.

    DST.partial/   filled, may be left behind by a killed process and picked up again
        │  every file and the folder fsynced, manifest written last
        └──rename──> DST/   with gantline-artefact.json: what it is, of which inputs it was made, and each file's size and hash

One process at a time makes DST, wherever it runs (`volume_lock.py`); the others wait, and find it made. A process that finds DST with the
same inputs has nothing to do, one that finds it damaged goes on as if it were half made; one that finds something else in its place
refuses to touch it. `verify.py` reads what the manifest says of the files.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gantline_runtime import logs
from gantline_runtime.checkpoint.files import load_json
from gantline_runtime.errors import CapacityError, CheckpointError, ConfigurationError
from gantline_runtime.shared_files import open_up
from gantline_runtime.termination import Reason
from gantline_runtime.volume_lock import VolumeLock

__all__ = [
    "MANIFEST", "FileRecord", "Manifest", "Recipe", "Staging", "find_artefact", "find_damage", "hash_file", "read_manifest",
    "require_space", "sync",
]  # fmt: skip

log = logging.getLogger("gantline.artefact")

MANIFEST = "gantline-artefact.json"
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_FILES = 4096
_SPARE_BYTES = 64 << 20
"""Left free on the volume beside what is about to be written: file systems slow down or fail when the last block goes."""


@dataclass(frozen=True)
class FileRecord:
    """A file of an artefact as it was published. `name` is relative to the folder."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """What an artefact is made by and of: equal recipes, equal artefacts."""

    kind: str
    version: int
    inputs: Mapping[str, Any]


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
    files: Sequence[FileRecord] = ()
    """All but the manifest itself; written when it is published. Artefacts of releases before had none."""

    def to_json(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if value is not None and key != "extra"}
        return {**values, **self.extra}

    def made_of(self, kind: str, version: int, inputs: Mapping[str, Any]) -> bool:
        return (self.kind, self.algorithm_version, dict(self.inputs)) == (kind, version, dict(inputs))


def find_artefact(target: Path, kind: str, version: int, inputs: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a whole artefact at `target` that was made of the same inputs; None where nothing is there, or where files are
    missing or have another size than they were published with.

    Raises ConfigurationError where `target` holds anything else.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    manifest = read_manifest(target)
    if manifest is not None and manifest.made_of(kind, version, inputs):
        damage = find_damage(target, manifest)
        if damage:
            log.warning("damaged, and made again", extra=logs.fields(path=str(target), damage=damage))
        return None if damage else manifest
    what = "something else" if manifest is None else f"an artefact ({manifest.kind}) of other inputs"
    raise ConfigurationError(f"{target} exists and holds {what}", cure="Give another target, or move it away first.")


def find_damage(folder: Path, manifest: Manifest) -> str:
    """The first file that is not there or has another size than it was published with, as a clause; empty where there is none. Reads no
    file, so that it costs milliseconds."""
    for file in manifest.files:
        try:
            size = (folder / file.name).stat().st_size
        except OSError:
            return f"{file.name} is missing"
        if size != file.size:
            return f"{file.name} has {size} bytes instead of {file.size}"
    return ""


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`, or None where there is none that can be read."""
    try:
        path = folder / MANIFEST
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            return None
        values = load_json(path.read_bytes(), MANIFEST)
        known = {key: values[key] for key in ("kind", "algorithm_version", "inputs", "bytes", "facts")}
        files = tuple(_read_file_record(item) for item in values.get("files") or ())
    except (OSError, KeyError, TypeError, ValueError, CheckpointError):
        return None
    if not isinstance(known["inputs"], dict) or not isinstance(known["facts"], dict):
        return None
    perplexity = values.get("perplexity")
    return Manifest(**known, perplexity=perplexity if isinstance(perplexity, dict) else None, files=files)


def _read_file_record(item: Mapping[str, Any]) -> FileRecord:
    """Raises KeyError, TypeError or ValueError for what no release wrote, such as a path that leads out of the folder."""
    name, size, sha256 = item["name"], item["size"], item["sha256"]
    if not isinstance(name, str) or not isinstance(size, int) or not isinstance(sha256, str):
        raise TypeError("a file's record has other types")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError("a file's name leads out of the folder")
    return FileRecord(name, size, sha256)


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
    """`TARGET.partial`, held by one process at a time, of all nodes that mount the volume.

    Entering waits while another process makes the same target. With `recipe`, `done` is what that one made meanwhile, if anything; a
    damaged artefact of the recipe is half made from then on. Leaving the `with` block without `publish()` keeps the folder, so that the
    next try can go on; `discard()` removes it. Disk-full errors inside the block become CapacityError. A process that is thought dead by
    another one (it stood still for a minute) is interrupted when it wakes, as by Ctrl-C: the folder is not its any more.
    """

    def __init__(self, target: Path, recipe: Recipe | None = None) -> None:
        self.target = target
        self.folder = target.with_name(target.name + ".partial")
        self.done: Manifest | None = None
        self._recipe = recipe
        self._lock = VolumeLock(target.parent, target.name, lost=_thread.interrupt_main)

    def __enter__(self) -> Staging:
        try:
            self._lock.take(self._say_waiting)
        except OSError as error:
            raise _write_error(self.folder, error) from error
        try:
            self._begin()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise _write_error(self.folder, error) from error
            raise
        return self

    def _begin(self) -> None:
        if self._recipe is not None:
            self.done = find_artefact(self.target, self._recipe.kind, self._recipe.version, self._recipe.inputs)
            if self.done is not None:
                return
            if self.target.is_dir() and any(self.target.iterdir()):
                self._take_apart()
        self.folder.mkdir(parents=True, exist_ok=True)

    def _take_apart(self) -> None:
        """What is whole of a damaged artefact need not be made again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.target.rename(self.folder)
        (self.folder / MANIFEST).unlink()

    def _say_waiting(self, holder: str) -> None:
        # `progress` makes the line one that the operator shows in the service's status.
        log.info(f"waiting for {holder or 'another process'}, which makes the same", extra=logs.fields(progress=0.0))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise _write_error(self.folder, error) from error

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Remove everything: what a former try left does not belong to this one."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def publish(self, manifest: Manifest, hashes: Mapping[str, str] | None = None) -> Manifest:
        """Make the folder readable and durable, and give it its name. The manifest as it was written, with what its files are; `hashes`
        are those (SHA-256, by name) that the caller knows, the others are read for theirs.

        Raises ConfigurationError if the name was taken meanwhile, LockLost if another process makes the target by now.
        """
        manifest = replace(manifest, files=self._record_files(hashes or {}))
        (self.folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in sorted(self.folder.rglob("*")):
            open_up(path)
            sync(path)
        open_up(self.folder)
        sync(self.folder)
        self._lock.check()
        try:
            self.folder.rename(self.target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ConfigurationError(f"{self.target} appeared while it was made", cure="Give another target.") from error
            raise
        sync(self.target.parent)
        return manifest

    def _record_files(self, hashes: Mapping[str, str]) -> list[FileRecord]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file() and path != self.folder / MANIFEST)
        assert len(paths) <= _MAX_FILES, f"{len(paths)} files in one artefact"
        names = [str(path.relative_to(self.folder)) for path in paths]
        return [
            FileRecord(name, path.stat().st_size, hashes.get(name) or hash_file(path)) for name, path in zip(names, paths, strict=True)
        ]  # fmt: skip


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
    cure = "Give a target that this user may write; another user's files have to be writable for a group of its (chmod -R g+rwX)."
    return ConfigurationError(f"{folder} cannot be written: {error.strerror}", cure=cure)
