"""From a folder of files to a `Checkpoint`: which files count, what they hold, whether it fits config.json."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, FileSource, LocalFiles, load_json, not_a_model, quote
from gantline_runtime.checkpoint.headers import MAX_TENSORS, TensorInfo, read_header
from gantline_runtime.checkpoint.shape import ModelShape, longest_session, parse_shape
from gantline_runtime.checkpoint.tensors import check_tensors
from gantline_runtime.errors import CheckpointError
from gantline_runtime.model_facts import ModelFacts, Quantization
from gantline_runtime.termination import Reason

__all__ = ["INDEX", "SINGLE", "Checkpoint", "describe_checkpoint", "open_checkpoint", "read_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_SHARDS = 2048
_SAMPLES = 12
_SAMPLE_BYTES = 16 << 10
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole and consistent. Weights are not loaded; `tensors` says where they lie."""

    label: str
    source: FileSource
    """Where the files lie: `LocalFiles`, or a hub."""
    config: Mapping[str, Any]
    """config.json, decoded."""
    shape: ModelShape
    facts: ModelFacts
    tensors: Mapping[str, TensorInfo]
    unused: tuple[str, ...]
    """Tensors that the model does not use (old buffers, a tied head)."""

    def path(self, tensor: str) -> Path:
        """The local file that holds `tensor`. Raises CheckpointError where a link leads out of the folder."""
        assert isinstance(self.source, LocalFiles), "a remote checkpoint has no paths"
        return self.source.path(self.tensors[tensor].file)

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the safetensors files, sorted."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in a local folder. Raises SourceError or CheckpointError, each with the cause, file and tensor named."""
    return read_checkpoint(LocalFiles(folder))


def read_checkpoint(files: FileSource, *, name: str = "", revision: str = "") -> Checkpoint:
    """The checkpoint in `files`; `name` and `revision` go into the facts (default: the folder's name)."""
    digest = hashlib.sha256()
    config = load_json(_read_whole(files, "config.json", digest), "config.json")
    shape = parse_shape(config)
    placed, shards = _find_shards(files, digest)
    tensors = _read_shards(files, shards, digest)
    _check_index(placed, tensors)
    unused = check_tensors(shape, tensors) if shape.family != "transformers" else ()  # that code knows its tensors when it loads them
    _sample_data(files, tensors, digest)
    label = _printable(name or Path(files.label).name)
    facts = _build_facts(config, shape, tensors, name=label, revision=revision, fingerprint=f"sha256:{digest.hexdigest()}")
    return Checkpoint(files.label, files, MappingProxyType(config), shape, facts, MappingProxyType(tensors), unused)


def describe_checkpoint(config: Mapping[str, Any], name: str) -> Checkpoint:
    """A checkpoint of which there is nothing but config.json, decoded: for what looks at shapes alone. Raises CheckpointError."""
    shape = parse_shape(config)
    facts = _build_facts(config, shape, {}, name=name, revision="", fingerprint="")
    return Checkpoint(name, _NoFiles(name), MappingProxyType(dict(config)), shape, facts, {}, ())


@dataclass(frozen=True)
class _NoFiles:
    label: str
    sizes: Mapping[str, int] = field(default_factory=dict)

    def read(self, name: str, start: int, length: int) -> bytes:
        raise CheckpointError(f"{self.label} has no file {quote(name)}: only its config.json is known", cure="Give a whole checkpoint.")


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() and not "\ud800" <= c <= "\udfff" else "?" for c in name)[:256]


def _read_whole(files: FileSource, name: str, digest: Any) -> bytes:
    size = files.sizes.get(name)
    if size is None:
        raise not_a_model(files, name)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{quote(name)} has {size} bytes; at most {MAX_JSON_BYTES} are read", cure="This is not a model's file.")
    data = files.read(name, 0, size)
    digest.update(b"%s\0%d\0" % (name.encode(), size) + data)
    return data


def _find_shards(files: FileSource, digest: Any) -> tuple[Mapping[str, str] | None, list[str]]:
    """(the index's placement of tensors, or None without an index; names of the safetensors files)."""
    if INDEX in files.sizes:
        placed = _parse_index(_read_whole(files, INDEX, digest))
        return placed, sorted(set(placed.values()))
    candidates = [name for name in files.sizes if name.endswith(".safetensors")]
    if SINGLE in candidates:
        return None, [SINGLE]
    if len(candidates) == 1:
        return None, candidates
    if candidates:
        raise CheckpointError(
            f"{files.label} has {len(candidates)} safetensors files and no {INDEX}", cure="Copy or download the index file as well."
        )
    pickles = sorted(name for name in files.sizes if name.endswith(_PICKLES))
    if pickles:
        raise CheckpointError(
            f"{files.label} has weights only as {quote(pickles[0])}, a format that can run code when loaded",
            reason=Reason.UNSAFE_WEIGHTS,
            cure="Convert the weights to safetensors (transformers' save_pretrained does), or use a revision that has them.",
        )
    raise not_a_model(files, "safetensors file")


def _parse_index(data: bytes) -> dict[str, str]:
    weight_map = load_json(data, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{INDEX} has no usable weight_map", cure="Copy or download the index file again.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{INDEX} places the tensor {quote(tensor)} in {quote(file)}, which is no safetensors file of the folder",
                cure="Do not use this checkpoint unless you trust its publisher; download it again.",
            )
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise CheckpointError(f"{INDEX} names more than {_MAX_SHARDS} files", cure="Copy or download the index file again.")
    return weight_map


def _read_shards(files: FileSource, shards: list[str], digest: Any) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        raw, found = read_header(files, shard)
        digest.update(b"%s\0%d\0" % (shard.encode("utf-8", "surrogatepass"), len(raw)) + raw)
        for tensor in found:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"the tensor {quote(tensor.name)} is in both {quote(tensors[tensor.name].file)} and {quote(shard)}",
                    cure="Copy or download the checkpoint again.",
                )
            tensors[tensor.name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"more than {MAX_TENSORS} tensors", cure="This is not a model of a supported family.")
    return tensors


def _sample_data(files: FileSource, tensors: Mapping[str, TensorInfo], digest: Any) -> None:
    """Feed pieces of the weights to the fingerprint: two trainings of one model have equal headers, and must not pass for one another.

    At least `_SAMPLES` pieces in all and one a shard, evenly spread, so that a hub is asked little and a finetune is still told apart.
    """
    ends: dict[str, tuple[int, int]] = {}
    for tensor in tensors.values():
        start, end = ends.get(tensor.file, (tensor.start, tensor.end))
        ends[tensor.file] = min(start, tensor.start), max(end, tensor.end)
    pieces = -(-_SAMPLES // max(1, len(ends)))
    for shard, (start, end) in sorted(ends.items()):
        for number in range(pieces):
            position = start + (end - start) * (2 * number + 1) // (2 * pieces)
            digest.update(files.read(shard, position, min(_SAMPLE_BYTES, end - position)))


def _check_index(placed: Mapping[str, str] | None, tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in (placed or {}).items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{INDEX} places the tensor {quote(name)} in {quote(file)}, where it is not", cure="Copy or download the checkpoint again."
            )


def _build_facts(
    config: Mapping[str, Any], shape: ModelShape, tensors: Mapping[str, TensorInfo], *, name: str, revision: str, fingerprint: str
) -> ModelFacts:
    awq = shape.awq
    return ModelFacts(
        name=name,
        revision=revision,
        fingerprint=fingerprint,
        architecture=shape.architecture,
        family=shape.family,
        supported=True,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=longest_session(config, shape),
        sliding_window=shape.sliding_window,
        tie_word_embeddings=shape.tie_word_embeddings,
        dtype=shape.dtype or _main_dtype(tensors),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        quantization=None if awq is None else Quantization(method="awq", bits=awq.bits, group_size=awq.group_size, version="gemm"),
        fallback_reason=shape.fallback_reason or None,
    )


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The type of the largest tensor of floating point, where config.json names none."""
    floats = [tensor for tensor in tensors.values() if tensor.dtype in _DTYPE_NAMES]
    if not floats:
        raise CheckpointError("the checkpoint has no tensor of floating point", cure="Give the weights of a language model.")
    return _DTYPE_NAMES[max(floats, key=lambda tensor: tensor.nbytes).dtype]
