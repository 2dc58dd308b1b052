"""A model in an image registry, as an artifact or an image: judged by its headers, fetched layer by layer, each verified by its digest."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import posixpath
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gantline_runtime.checkpoint.files import quote
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.sources.artifact import Layer, Member, clean_path, find_model, index_layers, is_mountable, parse_layers
from gantline_runtime.sources.layers import open_layer
from gantline_runtime.sources.registry import INDEXES, Registry
from gantline_runtime.sources.remote import DOWNLOADS, RemoteFile, Room
from gantline_runtime.sources.transfer import Downloaded, download_all, read_range, resume_file
from gantline_runtime.sources.uri import ImageReference

__all__ = ["OciFiles"]

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_REVISION = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


class OciFiles:
    """The files of the folder of an image or artifact that holds config.json.

    A tag is looked up once: `revision`, a digest, is what is read from then on.
    Raises SourceError: DownloadUnauthorized, ModelNotFound, DownloadRateLimited, DownloadStalled; CheckpointError for what is no model.
    """

    def __init__(self, reference: ImageReference, revision: str = "") -> None:
        if revision and not _REVISION.fullmatch(revision):
            raise ConfigurationError(f"{quote(revision)} is no revision of an image", cure="Give a digest (sha256:...) or none.")
        self.label = f"oci://{reference.registry}/{reference.repository}"
        self.name = reference.repository
        self._registry = Registry(reference, self.label)
        self.service = self._registry.service
        self.revision, manifest = self._registry.manifest(revision or reference.digest or reference.tag)
        if manifest.get("mediaType") in INDEXES or "manifests" in manifest:
            _, manifest = self._registry.manifest(_choose_platform(manifest, self.label))
        self._contents: dict[str, io.RawIOBase] = {}
        self._members = find_model(index_layers(parse_layers(manifest, self.label), self._open_layer, self.label), self.label)
        folder = posixpath.dirname(next(iter(self._members.values())).path)
        self.image_folder = folder if is_mountable(manifest, self._registry.config) else None
        """Where the model lies in the image; None where it is an artifact, which no container runtime mounts."""
        self.files: Mapping[str, RemoteFile] = {name: _remote_file(name, member) for name, member in self._members.items()}
        self.sizes: Mapping[str, int] = {file.name: file.size for file in self.files.values()}
        self.inputs = {"registry": reference.registry, "repository": reference.repository, "revision": self.revision}

    def read(self, name: str, start: int, length: int) -> bytes:
        member = self._members[name]
        if member.layer.path:
            return read_range(self.service, partial(self._registry.open_blob, member.layer.digest), start, length)
        contents = self._open_layer(member.layer)
        contents.seek(member.start + start)
        data = contents.read(length)
        if data is None or len(data) != length:
            raise CheckpointError(f"{quote(name)} of {self.label} is truncated", cure="Push it again.")
        return data

    def room(self, wanted: Sequence[RemoteFile]) -> Room:
        """A tar is there beside what is taken out of it, of a few layers at once."""
        layers = self._layers(wanted)
        tars = sum(layer.size for layer in layers if not layer.path)
        return Room(sum(layer.size for layer in layers), sum(file.size for file in wanted) + tars)

    def download(self, wanted: Sequence[RemoteFile], folder: Path, downloaded: Downloaded) -> Sequence[RemoteFile]:
        jobs = [
            partial(self._fetch_layer, layer, [file for file in wanted if self._members[file.name].layer == layer], folder, downloaded)
            for layer in self._layers(wanted)
        ]
        download_all(jobs, downloaded)
        return [replace(file, sha256="") for file in wanted]  # each layer was verified before its files had their names

    def _fetch_layer(self, layer: Layer, wanted: Sequence[RemoteFile], folder: Path, downloaded: Downloaded) -> None:
        # Whatever has its name already was taken from a verified blob, or will be verified itself.
        if all((folder / file.name).exists() and (folder / file.name).stat().st_size == file.size for file in wanted):
            downloaded.found(layer.size)
            return
        blob = folder / DOWNLOADS / f"{layer.digest.replace(':', '-')}.{wanted[0].name if layer.path else 'tar'}"
        resume_file(self.service, partial(self._registry.open_blob, layer.digest), blob, layer.size, downloaded)
        if downloaded.cancelled.is_set():
            return
        _verify(blob, layer, self.label)
        if layer.path:
            blob.rename(folder / wanted[0].name)
            return
        _unpack(blob, {self._members[file.name].path: folder / file.name for file in wanted}, self.label)
        blob.unlink()

    def _layers(self, wanted: Sequence[RemoteFile]) -> list[Layer]:
        return list(dict.fromkeys(self._members[file.name].layer for file in wanted))

    def _open_layer(self, layer: Layer) -> io.RawIOBase:
        if layer.digest not in self._contents:
            opened = open_layer(self.service, partial(self._registry.open_blob, layer.digest), layer.size, f"a layer of {self.label}")
            self._contents[layer.digest] = opened
        return self._contents[layer.digest]


def _remote_file(name: str, member: Member) -> RemoteFile:
    return RemoteFile(name, member.size, sha256=member.layer.digest.removeprefix("sha256:") if member.layer.path else "")


def _choose_platform(index: Mapping[str, Any], label: str) -> str:
    """The digest of this machine's image; of the first one where none is made for it, since a model is the same on all."""
    items = [item for item in index.get("manifests") or () if isinstance(item, dict) and _REVISION.fullmatch(str(item.get("digest")))]
    machine = _MACHINES.get(platform.machine(), "")
    built_for = [(_architecture(item.get("platform")), item["digest"]) for item in items]
    known = [(architecture, digest) for architecture, digest in built_for if architecture != "unknown"]  # those are attestations
    if not known:
        raise CheckpointError(f"the index of {label} names no image", cure="Push it again.")
    return next((digest for architecture, digest in known if architecture == machine), known[0][1])


def _architecture(where: Any) -> str:
    return str(where.get("architecture", "")) if isinstance(where, dict) else ""


def _verify(blob: Path, layer: Layer, label: str) -> None:
    """A blob that differs is removed, so that the next try fetches it anew."""
    with blob.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if f"sha256:{digest}" != layer.digest:
        blob.unlink()
        cure = "Fetch it again; if it stays so, ask the registry's operator."
        raise CheckpointError(f"a layer of {label} came with another hash than its digest says", cure=cure)


def _unpack(blob: Path, wanted: Mapping[str, Path], label: str) -> None:
    """All files under passing names first: what has its own is whole. A path that comes twice counts as its last one, as when indexed."""
    unpacked: dict[Path, Path] = {}
    try:
        with tarfile.open(blob, mode="r:*") as archive:
            for item in archive:
                target = wanted.get(clean_path(item.name)) if item.isreg() else None
                if target is None:
                    continue
                contents, passing = archive.extractfile(item), blob.with_name(f"{target.name}.unpacked")
                assert contents is not None, "a regular file has contents"
                with passing.open("wb") as stream:
                    shutil.copyfileobj(contents, stream, 1 << 20)
                unpacked[target] = passing
    except (tarfile.TarError, EOFError) as error:
        raise CheckpointError(f"a layer of {label} cannot be unpacked: {error}"[:300], cure="Push it again.") from None
    for target, passing in unpacked.items():
        os.replace(passing, target)
