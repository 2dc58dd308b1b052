# mypy: disable-error-code="no-untyped-def"
"""Triton's kernels as machine code made beforehand, so that a server launches without compiling.

$GANTLINE_TRITON_KERNELS names a folder that `gantline prebuild-kernels` has filled on a machine without a GPU, as an image's build does.
In it each compiled kernel has a folder, named by Triton's own key, with the machine code (.cubin) and what a launch needs to know (.json);
no path is written down, so the folder may lie anywhere and be read-only. Kernels that it lacks are compiled and kept as Triton does, in
$TRITON_CACHE_DIR; where that cannot be written to, in the temporary folder.

A key is a hash of the kernel's source, its arguments' types, its constants and options, the GPU's architecture, the assembler's version
and of Triton itself. For the latter Triton reads and hashes all its files, 1 to 2 s of a start; here its version stands for them, which
also makes keys the same for every Python.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.runtime import cache
from triton.runtime.cache import CacheManager, FileCacheManager

__all__ = ["KEPT", "VARIABLE", "Counts", "KernelCache", "counts", "install", "is_made", "use_version_as_key", "write_versions"]

VARIABLE = "GANTLINE_TRITON_KERNELS"
_VERSIONS = "versions"
_MAX_NAME = 150
"""Characters of a kernel's name that Triton uses in its files' names."""
KEPT = (".cubin", ".json")
"""What a launch needs of a compiled kernel's files."""

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """Kernels that this process has loaded so far, by where they came from."""

    image: int = 0
    """From the folder that was made beforehand."""
    cache: int = 0
    """From Triton's own cache: an earlier process compiled them."""
    compiled: int = 0


counts = Counts()
_folder: Path | None = None
"""What was made beforehand, or None."""


def install() -> None:
    """Have Triton look where the environment names a folder, and survive a cache folder that cannot be written to.

    A cache manager that $TRITON_CACHE_MANAGER names is left alone.
    """
    global _folder
    if "TRITON_CACHE_MANAGER" in os.environ:
        return
    knobs.cache.manager_class = KernelCache
    named = os.environ.get(VARIABLE)
    _folder = Path(named) if named and _fits(Path(named)) else None
    if _folder is not None:
        use_version_as_key()


def is_made(key: str, name: str) -> bool:
    """Whether the folder that `install` found has the kernel of this key and name: a launch would read it and compile nothing."""
    return {Path(file).suffix for file in KernelCache(key).find_made(f"{name[:_MAX_NAME]}.json")} >= set(KEPT)


def use_version_as_key() -> None:
    """From now on Triton's version stands for the hash of its files in every key of this process."""
    cache.triton_key = _version


def write_versions(folder: Path) -> None:
    """Note in a folder of kernels what they were made with."""
    (folder / _VERSIONS).write_text(_version())


def _version() -> str:
    return f"Triton {triton.__version__}"


def _fits(folder: Path) -> bool:
    """Whether these kernels were made for this Triton: others would never be found, and every start would be slow for no visible reason."""
    try:
        built = (folder / _VERSIONS).read_text()
    except OSError as error:
        log.warning("no Triton kernels are read from %s, named by %s: %s; they will be compiled", folder, VARIABLE, error.strerror)
        return False
    if built != _version():
        log.warning("the Triton kernels in %s were made for %s, and this is %s; they will be compiled", folder, built, _version())
    return built == _version()


class KernelCache(CacheManager):
    """The files of one kernel: made beforehand, or kept by Triton's own manager."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        """`override` and `dump`: Triton's folders for debugging, which are its own matter."""
        self._key = key
        self._made = _folder / key if _folder is not None and not (override or dump) else None
        self._own: FileCacheManager | None = FileCacheManager(key, override, dump) if override or dump else None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Paths of a compiled kernel's files, or None. Triton asks once for each kernel of a process."""
        made = self.find_made(filename)
        if made:
            counts.image += 1
            return made
        kept: dict[str, str] | None = self._writable().get_group(filename)
        counts.cache += bool(kept)
        return kept

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        counts.compiled += 1
        path: str = self._writable().put_group(filename, group)
        return path

    def get_file(self, filename: str) -> str | None:
        path: str | None = self._writable().get_file(filename)
        return path

    def put(self, data, filename: str, binary: bool = True) -> str:
        path: str = self._writable().put(data, filename, binary)
        return path

    def find_made(self, filename: str) -> dict[str, str]:
        """Of what was made beforehand alone: names and paths of the kernel's files, none where it is not among it."""
        if self._made is None or not (self._made / filename).is_file():
            return {}
        return {file.name: str(file) for file in self._made.iterdir() if file.suffix in KEPT}

    def _writable(self) -> FileCacheManager:
        if self._own is None:
            try:
                self._own = FileCacheManager(self._key)
            except OSError as error:
                _use_temporary_folder(error)
                self._own = FileCacheManager(self._key)
        return self._own


def _use_temporary_folder(cause: OSError) -> None:
    """Keep what is compiled in a folder that only this user can enter. Raises OSError if there is none to write to."""
    folder = Path(tempfile.gettempdir(), f"gantline-triton-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise OSError(f"{folder} belongs to somebody else: give TRITON_CACHE_DIR a folder that can be written to") from cause
    log.warning("%s cannot be written to (%s): kernels that are compiled are kept in %s", knobs.cache.dir, cause.strerror, folder)
    knobs.cache.dir = str(folder)
