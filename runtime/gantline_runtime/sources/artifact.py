"""Which files an image or artifact holds, from its manifest and its layers' tar headers.

    a layer with the annotation org.opencontainers.image.title (ORAS) or org.cncf.model.filepath (ModelPack)     one file, as it is
    ... and io.deis.oras.content.unpack, or with a media type that ends in tar, tar+gzip or the like             a tar of files

The latter are KitOps' and ModelPack's layers, and those of ordinary images ("modelcars"). As in a file system, later layers win, and
whiteouts take away what earlier ones brought. Only regular files count.
"""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gantline_runtime.checkpoint.files import MAX_FILES, quote
from gantline_runtime.errors import CheckpointError
from gantline_runtime.sources.remote import is_file_name
from gantline_runtime.termination import Reason

__all__ = ["Layer", "Member", "clean_path", "find_model", "index_layers", "is_mountable", "parse_layers"]

_MAX_LAYERS = 4096
_MAX_ENTRIES = 10 * MAX_FILES
"""Of all layers together: the base of an image has files of its own."""
_TITLES = ("org.opencontainers.image.title", "org.cncf.model.filepath", "org.cnai.model.filepath")
_UNPACK = "io.deis.oras.content.unpack"
_TAR = re.compile(r".*[./+]tar([.+](gzip|gz|zstd))?", re.ASCII)
_MODEL_FORMATS = re.compile(r"application/vnd\.(cncf|cnai|kitops)\.", re.ASCII)
_IMAGE_CONFIGS = frozenset({"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"})
_IMAGE_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.v1\.tar(\+(gzip|zstd))?|docker\.image\.rootfs\.diff\.tar(\.(gzip|zstd))?)", re.ASCII
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


@dataclass(frozen=True)
class Layer:
    """A blob of a manifest. `path` is set where it is one file; without, it is a tar."""

    digest: str
    size: int
    path: str = ""


@dataclass(frozen=True)
class Member:
    """A file: `size` bytes from `start` of its layer's contents."""

    layer: Layer
    path: str
    start: int
    size: int


def parse_layers(manifest: Mapping[str, Any], label: str) -> list[Layer]:
    """The layers that may hold files. Raises CheckpointError for what is no manifest."""
    items = manifest.get("layers")
    if not isinstance(items, list) or len(items) > _MAX_LAYERS:
        raise CheckpointError(f"the manifest of {label} has no layers", reason=Reason.NOT_A_MODEL, cure="Give an image or artifact.")
    return [layer for layer in (_parse_layer(item, label) for item in items) if layer is not None]


def _parse_layer(item: Any, label: str) -> Layer | None:
    values = item if isinstance(item, dict) else {}
    digest, size, media_type = values.get("digest"), values.get("size"), values.get("mediaType")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or type(size) is not int or size < 0 or not isinstance(media_type, str):
        raise CheckpointError(f"the manifest of {label} has a layer without a sha256 digest, size and media type", cure="Push it again.")
    notes = values.get("annotations")
    notes = notes if isinstance(notes, dict) else {}
    is_tar = bool(_TAR.fullmatch(media_type))
    title = clean_path(next((notes[key] for key in _TITLES if isinstance(notes.get(key), str)), ""))
    if title and notes.get(_UNPACK) != "true" and not (is_tar and _MODEL_FORMATS.match(media_type)):
        return Layer(digest, size, title)  # ORAS gives plain files an image layer's media type
    return Layer(digest, size) if is_tar or notes.get(_UNPACK) == "true" else None


def is_mountable(manifest: Mapping[str, Any], read_config: Callable[[str], Mapping[str, Any]]) -> bool:
    """Whether it is an image, which container runtimes unpack and mount: layers of files, all of them named by its configuration, which
    `read_config` reads by its digest. Artifacts have another configuration, and what looks like a layer may be a single file."""
    config, layers = manifest.get("config"), manifest.get("layers")
    if not isinstance(config, dict) or not isinstance(layers, list) or config.get("mediaType") not in _IMAGE_CONFIGS:
        return False
    if not all(isinstance(layer, dict) and _IMAGE_LAYER.fullmatch(str(layer.get("mediaType"))) for layer in layers):
        return False
    try:
        filesystem = read_config(str(config.get("digest"))).get("rootfs")
    except CheckpointError:
        return False
    contents = filesystem.get("diff_ids") if isinstance(filesystem, dict) else None
    return isinstance(contents, list) and len(contents) == len(layers) > 0


def clean_path(path: str) -> str:
    """Relative and normal; empty for what is none or leads out."""
    clean = posixpath.normpath(path.lstrip("/")) if path else ""
    return "" if clean in ("", ".") or clean.startswith("../") or clean == ".." or "\0" in clean or len(clean) > 4096 else clean


def index_layers(layers: Iterable[Layer], open_layer: Callable[[Layer], io.RawIOBase], label: str) -> dict[str, Member]:
    """All files by path. Raises SourceError, CheckpointError."""
    found: dict[str, Member] = {}
    entries = 0
    for layer in layers:
        if layer.path:
            found[layer.path] = Member(layer, layer.path, 0, layer.size)
            continue
        made: dict[str, Member] = {}
        for item in _entries(open_layer(layer), label):
            entries += 1
            if entries > _MAX_ENTRIES:
                raise CheckpointError(f"{label} has more than {_MAX_ENTRIES} files", cure="Give an image with a model and little else.")
            path = clean_path(item.name)
            folder, name = posixpath.split(path)
            if name.startswith(_WHITEOUT):
                _take_away(found, folder, name)
            elif path and item.isreg() and not item.issparse():
                made[path] = Member(layer, path, item.offset_data, item.size)
        found |= made
    return found


def _entries(contents: Any, label: str) -> Iterator[tarfile.TarInfo]:
    """Of a tar. Raises CheckpointError for what is none."""
    try:
        with tarfile.open(fileobj=contents, mode="r:") as archive:
            for item in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                yield item
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise CheckpointError(f"a layer of {label} is no tar archive: {error}"[:300], cure="Push it again.") from None


def _take_away(found: dict[str, Member], folder: str, name: str) -> None:
    gone = folder if name == _OPAQUE else posixpath.join(folder, name.removeprefix(_WHITEOUT))
    for path in [path for path in found if path == gone or path.startswith(f"{gone}/")]:
        del found[path]


def find_model(members: Mapping[str, Member], label: str) -> dict[str, Member]:
    """The files of the folder that holds config.json, by name: of several the one nearest to the root that has weights as well.

    Raises CheckpointError (NotAModel) where there is none, or no telling which.
    """
    folders = [posixpath.dirname(path) for path in members if posixpath.basename(path) == "config.json"]
    with_weights = {posixpath.dirname(path) for path in members if path.endswith(".safetensors")}
    candidates = [folder for folder in folders if folder in with_weights] or folders
    if not candidates:
        raise CheckpointError(
            f"{label} holds no config.json", reason=Reason.NOT_A_MODEL,
            cure="Push the files of a transformers model: config.json, its tokenizer and *.safetensors.",
        )  # fmt: skip
    depth = min(_depth(folder) for folder in candidates)
    nearest = sorted(folder for folder in candidates if _depth(folder) == depth)
    if len(nearest) > 1:
        raise CheckpointError(
            f"{label} holds several models, in {quote(nearest[0])} and {quote(nearest[1])}", reason=Reason.NOT_A_MODEL,
            cure="Push one model an image.",
        )  # fmt: skip
    inside = {posixpath.basename(path): member for path, member in members.items() if posixpath.dirname(path) == nearest[0]}
    return {name: member for name, member in inside.items() if is_file_name(name)}


def _depth(folder: str) -> int:
    return len(folder.split("/")) if folder else 0
