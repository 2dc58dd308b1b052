"""The header of a safetensors file, checked against the file's size.

    8 bytes: header length n (little endian) | n bytes: JSON {name: {dtype, shape, data_offsets: [begin, end]}} | data

Format: https://huggingface.co/docs/safetensors. The data must be covered exactly once: no holes, no overlaps, nothing behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, FileSource, load_json, quote, refuse_pointer
from gantline_runtime.errors import CheckpointError

__all__ = ["DTYPE_BITS", "MAX_TENSORS", "TensorInfo", "parse_header", "read_header"]

DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
MAX_TENSORS = 200_000
_MAX_DIMENSIONS = 8
_MAX_COUNT = 1 << 62
_AGAIN = "Copy or download the file again; if that does not help, the publisher's file is damaged."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `start` and `end` are byte offsets in `file`, so `file[start:end]` is the tensor, row-major, little endian."""

    name: str
    file: str
    dtype: str
    """safetensors' name, such as `BF16` or `I32`."""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(files: FileSource, file: str) -> tuple[bytes, list[TensorInfo]]:
    """(raw header bytes, tensors) of one file. Raises CheckpointError that names the file, and the tensor where one is at fault."""
    size = files.sizes.get(file)
    if size is None:
        raise CheckpointError(f"{files.label} lacks the shard {quote(file)}", cure="Copy or download the whole checkpoint again.")
    if size < 10:
        raise CheckpointError(f"{quote(file)} has {size} bytes, which is no safetensors file", cure=_AGAIN)
    length = int.from_bytes(files.read(file, 0, 8), "little")
    if length > size - 8:
        refuse_pointer(files.read(file, 0, min(size, 64)), quote(file))
        raise CheckpointError(f"{quote(file)} is truncated: its header claims {length} bytes and {size - 8} are left", cure=_AGAIN)
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"the header of {quote(file)} claims {length} bytes; at most {MAX_JSON_BYTES} are read", cure=_AGAIN)
    raw = files.read(file, 8, length)
    return raw, parse_header(raw, file=file, file_size=size)


def parse_header(raw: bytes, *, file: str, file_size: int) -> list[TensorInfo]:
    """Tensors of a header's JSON, in order of their offsets. `file_size` is the whole file's, in bytes."""
    header = load_json(raw, f"the header of {quote(file)}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{quote(file)} lists {len(header)} tensors; at most {MAX_TENSORS} are allowed", cure=_AGAIN)
    data_start = 8 + len(raw)
    tensors = [_parse_tensor(name, entry, file, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_cover(tensors, file, data_start, file_size)
    return tensors


def _parse_tensor(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    where = f"tensor {quote(name)} in {quote(file)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets", cure=_AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {quote(dtype)}", cure=_AGAIN)
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has an impossible shape", cure=_AGAIN)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has impossible data_offsets", cure=_AGAIN)
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        raise CheckpointError(f"{where} has shape {shape} of {dtype}, {bits / 8:g} bytes, but {end - begin} bytes of data", cure=_AGAIN)
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, data_start + end)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_COUNT for item in value)


def _check_cover(tensors: list[TensorInfo], file: str, data_start: int, file_size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            gap = tensor.start - position
            kind = "overlaps the tensor before it" if gap < 0 else f"leaves a hole of {gap} bytes before it"
            raise CheckpointError(f"tensor {quote(tensor.name)} in {quote(file)} {kind}", cure=_AGAIN)
        if tensor.end > file_size:
            missing = tensor.end - file_size
            raise CheckpointError(f"{quote(file)} is truncated: tensor {quote(tensor.name)} ends {missing} bytes past its end", cure=_AGAIN)
        position = tensor.end
    if position != file_size:
        raise CheckpointError(f"{quote(file)} has {file_size - position} bytes behind its last tensor", cure=_AGAIN)
