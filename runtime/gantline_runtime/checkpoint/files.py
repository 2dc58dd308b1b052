"""Where a checkpoint's files are read from: a folder here, remote sources in `gantline_runtime.sources`."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gantline_runtime.errors import CheckpointError, SourceError
from gantline_runtime.termination import Reason

__all__ = ["MAX_FILES", "MAX_JSON_BYTES", "FileSource", "LocalFiles", "load_json", "not_a_model", "quote", "refuse_pointer"]

MAX_FILES = 20_000
"""Most entries of a model's folder that are looked at."""
MAX_JSON_BYTES = 16 << 20
"""Largest config.json, index or safetensors header that is read, in bytes; the largest public models stay under 2 MiB."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git made in the place of a large one, where Git LFS was not installed."""
_MODEL_FILES = (".json", ".safetensors", ".jinja")


class FileSource(Protocol):
    """A flat folder of files that can be listed and read in pieces."""

    @property
    def label(self) -> str:
        """What error messages call the folder."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size in bytes of each regular file, by its name."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from offset `start`; raises CheckpointError where the file is shorter."""


class LocalFiles:
    """The regular files directly inside `root`.

    A link may point to a file inside `root`, or into the blobs beside a Hugging Face cache's snapshot; anything else that a link
    names is outside what the user gave us and is refused when read.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.label = str(root)
        self._allowed = _allowed_roots(self.root)
        self.sizes: Mapping[str, int] = self._scan()

    def _scan(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        try:
            with os.scandir(self.root) as entries:
                for count, entry in enumerate(entries):
                    if count >= MAX_FILES:
                        raise CheckpointError(
                            f"{self.label} has more than {MAX_FILES} entries",
                            reason=Reason.NOT_A_MODEL,
                            cure="Give the folder that holds config.json and the *.safetensors files, and little else.",
                        )
                    size = _regular_size(entry)
                    if size is None and entry.name.endswith(_MODEL_FILES) and _is_dangling(entry):
                        raise CheckpointError(
                            f"{quote(entry.name)} in {self.label} is a link to {quote(os.readlink(entry.path))}, where nothing is",
                            cure="Copy the files that links lead to (cp -L), or mount the whole folder in which they lie.",
                        )
                    if size is not None:
                        sizes[entry.name] = size
        except FileNotFoundError:
            raise SourceError(f"{self.label} does not exist", cure=_cure_of_missing(self.label)) from None
        except NotADirectoryError:
            raise CheckpointError(
                f"{self.label} is not a folder", reason=Reason.NOT_A_MODEL, cure="Give the folder that holds config.json."
            ) from None
        except PermissionError:
            raise SourceError(
                f"{self.label} cannot be listed: permission denied", cure="Give the process's user (or fsGroup) the right to read it."
            ) from None
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.label} cannot be listed: {error}", cure="Check the path and the volume it lies on.") from None
        return sizes

    def path(self, name: str) -> Path:
        """Path of the file `name`, links resolved. Raises CheckpointError where it leads out of the folder."""
        if name not in self.sizes:
            raise CheckpointError(f"{self.label} lacks the file {quote(name)}", cure="Copy the whole checkpoint again.")
        resolved = (self.root / name).resolve()
        if not any(resolved.is_relative_to(root) for root in self._allowed):
            raise CheckpointError(
                f"{quote(name)} in {self.label} is a link that leads out of the folder",
                cure="Replace the link by the file itself.",
            )
        return resolved

    def read(self, name: str, start: int, length: int) -> bytes:
        try:
            with self.path(name).open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise CheckpointError(
                f"{quote(name)} in {self.label} cannot be read: {error.strerror or error}", cure="Check permissions and the volume."
            ) from None
        if len(data) != length:
            raise CheckpointError(
                f"{quote(name)} in {self.label} ends {length - len(data)} bytes before byte {start + length}",
                cure="Copy or download the file again: it is truncated.",
            )
        return data


def _allowed_roots(root: Path) -> tuple[Path, ...]:
    resolved = Path(os.path.realpath(root))
    cached = resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--")
    return (resolved, resolved.parent.parent / "blobs") if cached else (resolved,)


def _regular_size(entry: os.DirEntry[str]) -> int | None:
    """Size of a regular file (through a link, too); None for folders, pipes, devices and dangling links, which are never opened."""
    try:
        status = entry.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _is_dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.lexists(os.path.realpath(entry.path))


def _cure_of_missing(folder: str) -> str:
    """Names of hubs, which other engines take in the place of a folder, are known by their form."""
    scheme, _, rest = folder.partition(":/")
    if scheme in ("hf", "s3", "oci"):
        return f"Download it first: `gantline fetch {scheme}://{rest.lstrip('/')} FOLDER`, and give that folder."
    cure = "Check the path, and in a pod the claim it is mounted from."
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", folder)
    return f"{cure} A hub's model is downloaded first: `gantline fetch hf://{folder} FOLDER`." if hub else cure


def not_a_model(files: FileSource, missing: str) -> CheckpointError:
    """The error (NotAModel) for a folder that lacks what a model must have, with what it looks like as the cure."""
    cure = "Give the folder that holds config.json and the *.safetensors files of a transformers model."
    snapshots = sorted(files.root.glob("snapshots/*/config.json")) if isinstance(files, LocalFiles) else []
    if snapshots:
        cure = f"This is a repository of a Hugging Face cache; give a snapshot inside of it: {snapshots[-1].parent}."
    elif "adapter_config.json" in files.sizes:
        cure = "This is an adapter (LoRA); give the folder of its base model."
    elif any(file.endswith(".gguf") for file in files.sizes):
        cure = "GGUF files are not read; give the original checkpoint in safetensors."
    return CheckpointError(f"{files.label} has no {missing}", reason=Reason.NOT_A_MODEL, cure=cure)


def refuse_pointer(data: bytes, what: str) -> None:
    """Raises CheckpointError where a file that begins with `data` is what Git made in its place."""
    if data.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{what} is a pointer of Git LFS, not the file itself",
            cure="Run `git lfs pull` where it was cloned, or download it with `gantline fetch`.",
        )


def load_json(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises CheckpointError for anything else: bad UTF-8, duplicate keys, NaN, too deep."""
    refuse_pointer(data, what)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        cause = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise CheckpointError(f"{what} is not valid JSON: {cause}", cure="Copy or download the file again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object", cure="Copy or download the file again.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{quote(twice)} is there twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def quote(name: object) -> str:
    """A name from an untrusted file as an error message may print it: escaped and at most 120 characters."""
    text = ascii(name)
    return text if len(text) <= 120 else f"{text[:117]}...'"
