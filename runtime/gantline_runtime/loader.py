"""From safetensors files to a rank's weights: each layer's targets say what goes where, this module only moves bytes.

On a CPU the files are mapped and copied from. To a GPU they are read by several threads into pinned buffers (`staging.py`), so that
reading, copying and converting overlap, with each other and with whatever else is done meanwhile. Either way only the slices that this
rank needs are read. `Checkpoint` has judged headers, shapes and types before; a file that has become shorter since is named here.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gantline_runtime.checkpoint import Checkpoint, TensorInfo
from gantline_runtime.errors import CheckpointError
from gantline_runtime.layers.weights import Target
from gantline_runtime.staging import StagedTransfers, Transfer

__all__ = ["Loaded", "Loading", "Progress", "WeightLoading"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


@dataclass(frozen=True)
class Progress:
    """How far one phase of the start has come."""

    phase: str
    done: int
    total: int


class Loading(Protocol):
    """A rank's weights on their way."""

    def wait(self) -> int:
        """Until they are there; returns their bytes in this rank's memory. Raises CheckpointError. To be called once."""
        ...

    def cancel(self) -> None:
        """Load no more of them; does nothing once they are there."""
        ...


@dataclass(frozen=True)
class Loaded:
    """Weights that are there: `num_bytes` of them."""

    num_bytes: int

    def wait(self) -> int:
        return self.num_bytes

    def cancel(self) -> None:
        pass


class WeightLoading:
    """Fills every target: on a GPU from now on, in threads of its own, on a CPU in `wait`, which tells `on_progress` of bytes that arrive.

    Errors name the tensor and the file at fault.
    """

    def __init__(self, checkpoint: Checkpoint, targets: Iterable[Target], on_progress: Callable[[Progress], None] | None = None) -> None:
        """Raises CheckpointError where the checkpoint lacks a tensor, or has it in another shape or type."""
        transfers = [_plan(checkpoint, target) for target in targets]
        transfers.sort(key=lambda transfer: (str(transfer.path), transfer.start))
        self._transfers = transfers
        self._report = on_progress or (lambda _: None)
        self._done, self._total = 0, sum(transfer.num_bytes for transfer in transfers)
        self._staged = StagedTransfers(transfers) if transfers and transfers[0].destination.is_cuda else None

    def wait(self) -> int:
        if self._staged is not None:
            self._staged.wait(self._advance)
        else:
            _copy_mapped(self._transfers, self._advance)
        return sum(transfer.destination.numel() * transfer.destination.element_size() for transfer in self._transfers)

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._report(Progress("weights", self._done, self._total))

    def cancel(self) -> None:
        if self._staged is not None:
            self._staged.cancel()


def _plan(checkpoint: Checkpoint, target: Target) -> Transfer:
    info = _find(checkpoint, target)
    return Transfer(
        name=info.name,
        path=checkpoint.path(info.name),
        start=info.start,
        dtype=_DTYPES[info.dtype],
        shape=info.shape,
        source=target.source,
        destination=target.destination,
    )


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


def _copy_mapped(transfers: list[Transfer], advance: Callable[[int], None]) -> None:
    with ExitStack() as stack:
        files: dict[Path, mmap.mmap] = {}
        for transfer in transfers:
            if transfer.path not in files:
                files[transfer.path] = _map_file(transfer.path, stack)
            _copy(transfer, files[transfer.path])
            advance(transfer.num_bytes)


def _map_file(path: Path, stack: ExitStack) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return stack.enter_context(_Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name!r} cannot be read: {error}", cure="Check permissions and the volume.") from None


class _Mapping(mmap.mmap):
    """Closing waits for nobody: tensors over the mapping may still live in an exception's frames."""

    def __exit__(self, *_: object) -> None:
        with suppress(BufferError):
            self.close()


def _copy(transfer: Transfer, data: mmap.mmap) -> None:
    transfer.check_length(len(data))
    count = transfer.num_elements
    if count:
        raw = torch.frombuffer(data, dtype=torch.uint8, count=count * transfer.dtype.itemsize, offset=transfer.start)
        if transfer.start % transfer.dtype.itemsize:
            raw = raw.clone()  # the format does not promise alignment
        transfer.destination.copy_(raw.view(transfer.dtype).view(transfer.shape)[transfer.source])
