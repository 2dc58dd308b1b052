"""From safetensors files to a rank's weights: each layer's targets say what goes where, this module only moves bytes.

Files are mapped, and only the slices that this rank needs are touched. `Checkpoint` has judged headers, shapes and types before.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch

from gantline_runtime.checkpoint import Checkpoint, TensorInfo
from gantline_runtime.errors import CheckpointError
from gantline_runtime.layers.weights import Target

__all__ = ["Progress", "load_weights"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


@dataclass(frozen=True)
class Progress:
    """How far one phase of the start has come; `total` 0 means that nobody knows."""

    phase: str
    done: int
    total: int


def load_weights(checkpoint: Checkpoint, targets: Iterable[Target], on_progress: Callable[[Progress], None] | None = None) -> int:
    """Fill every target; returns the bytes of its tensors, which `on_progress` hears of as they are done.

    Raises CheckpointError that names the tensor and file at fault.
    """
    wanted = [(target, _find(checkpoint, target)) for target in targets]
    wanted.sort(key=lambda pair: (pair[1].file, pair[1].start))
    total = sum(info.nbytes for _, info in wanted)
    done = 0
    with ExitStack() as stack:
        files: dict[str, mmap.mmap] = {}
        for target, info in wanted:
            if info.file not in files:
                files[info.file] = _map_file(checkpoint, info, stack)
            _copy(target, info, files[info.file])
            done += info.nbytes
            if on_progress is not None:
                on_progress(Progress("weights", done, total))
    return total


def _find(checkpoint: Checkpoint, target: Target) -> TensorInfo:
    info = checkpoint.tensors.get(target.name)
    if info is None:
        raise CheckpointError(f"the tensor {target.name!r} is missing in {checkpoint.label}", cure="Copy or download the checkpoint again.")
    if info.shape != target.shape or info.dtype not in _DTYPES or (info.dtype == "I32") != (target.destination.dtype == torch.int32):
        raise CheckpointError(
            f"the tensor {target.name!r} in {info.file!r} is {info.dtype} {list(info.shape)}; the model needs {list(target.shape)}",
            cure="Copy or download the checkpoint again.",
        )
    return info


def _map_file(checkpoint: Checkpoint, info: TensorInfo, stack: ExitStack) -> mmap.mmap:
    try:
        with checkpoint.path(info.name).open("rb") as file:
            return stack.enter_context(_Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{info.file!r} cannot be read: {error}", cure="Check permissions and the volume.") from None


class _Mapping(mmap.mmap):
    """Closing waits for nobody: tensors over the mapping may still live in an exception's frames."""

    def __exit__(self, *_: object) -> None:
        with suppress(BufferError):
            self.close()


def _copy(target: Target, info: TensorInfo, data: mmap.mmap) -> None:
    if info.end > len(data):
        raise CheckpointError(
            f"{info.file!r} is truncated: tensor {info.name!r} ends {info.end - len(data)} bytes past its end",
            cure="Copy or download the file again.",
        )
    dtype = _DTYPES[info.dtype]
    count = info.nbytes // dtype.itemsize
    if count:
        stored = torch.frombuffer(data, dtype=dtype, count=count, offset=info.start).view(info.shape)
        target.destination.copy_(stored[target.source])
