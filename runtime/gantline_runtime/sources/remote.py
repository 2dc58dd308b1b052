"""What all remote sources have in common: files that are listed, read in pieces, and brought into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gantline_runtime.checkpoint.files import FileSource
from gantline_runtime.sources.transfer import Downloaded

__all__ = ["DOWNLOADS", "RemoteFile", "RemoteSource", "Room", "is_file_name", "is_of_model"]

DOWNLOADS = ".download"
"""Folder inside the one that is filled, for files that are not whole yet."""

_BESIDE = frozenset({
    "config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "README.md", "LICENSE", "LICENSE.txt",
})  # fmt: skip
"""What belongs to a model beside its weights: nothing that is code, nothing that is a pickle."""


def is_of_model(name: str) -> bool:
    """Whether a file of that name may be a part of a model."""
    return name in _BESIDE or name.endswith(".safetensors")


def is_file_name(name: str) -> bool:
    """Whether `name`, of an untrusted listing, is a plain file's directly in a folder."""
    return bool(name) and "/" not in name and "\\" not in name and "\0" not in name and not name.startswith(".") and len(name) <= 255


@dataclass(frozen=True)
class RemoteFile:
    """One file, and the hash by which it is verified, if the source knows one: of its bytes, or (`blob`) git's."""

    name: str
    size: int
    sha256: str = ""
    blob: str = ""
    md5: str = ""


@dataclass(frozen=True)
class Room:
    """What bringing files here takes, in bytes."""

    transfer: int
    disk: int
    """At the worst moment."""


class RemoteSource(FileSource, Protocol):
    """A remote model, at one state of it."""

    @property
    def name(self) -> str:
        """What the model is called there."""

    @property
    def revision(self) -> str:
        """The state: a commit, a digest, a hash. Opening the source again with it gives the same files, or fails."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """What decides the files' contents, for an artefact's manifest."""

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """By name."""

    def room(self, wanted: Sequence[RemoteFile]) -> Room:
        """Of `download(wanted, ...)`."""

    def download(self, wanted: Sequence[RemoteFile], folder: Path, downloaded: Downloaded) -> Sequence[RemoteFile]:
        """Bring files into `folder`, going on with what a killed process left there, and return them with the hashes that they must have.

        Raises SourceError; CheckpointError where the source changed meanwhile.
        """
