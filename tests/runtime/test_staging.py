"""Reading weights in pieces, as it is done for a GPU: what lands in the buffers is what the tensor holds."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from gantline_runtime import staging
from gantline_runtime.errors import CheckpointError
from gantline_runtime.staging import PieceFiles, StagedTransfers, Transfer, pieces_of

SLICES = [(0, 40, 0, 24), (10, 30, 0, 24), (0, 40, 8, 16), (5, 9, 23, 24)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32]


def write(path: Path, tensor: torch.Tensor, *, offset: int) -> Path:
    path.write_bytes(b"\0" * offset + tensor.contiguous().view(torch.uint8).numpy().tobytes() + b"\0" * 5)
    return path


def values(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [8, 13])
@pytest.mark.parametrize("bounds", SLICES)
@pytest.mark.parametrize("buffer", [1, 100, 1 << 20])
def test_pieces_hold_just_the_slices(
    dtype: torch.dtype, offset: int, bounds: tuple[int, ...], buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (slice(*bounds[:2]), slice(*bounds[2:]))
    monkeypatch.setattr(staging, "_BUFFER_BYTES", buffer)
    tensor = values(40, 24, dtype=dtype)
    path = write(tmp_path / "file", tensor, offset=offset)
    destination = torch.zeros_like(tensor[source])
    transfer = Transfer("t", path, offset, dtype, (40, 24), source, destination)
    files = PieceFiles()
    for piece in pieces_of(transfer):
        filled = torch.empty(piece.num_bytes, dtype=torch.uint8)
        files.read(piece, filled)
        piece.destination.copy_(filled.view(dtype).view(piece.destination.shape))
    files.close()
    assert torch.equal(destination, tensor[source])
    assert sum(piece.num_bytes for piece in pieces_of(transfer)) == transfer.num_bytes


def test_a_vector_is_read_in_pieces_too(tmp_path: Path) -> None:
    tensor = values(33, dtype=torch.bfloat16)
    path = write(tmp_path / "file", tensor, offset=16)
    transfer = Transfer("t", path, 16, torch.bfloat16, (33,), (slice(3, 20),), torch.zeros(17, dtype=torch.bfloat16))
    (piece,) = pieces_of(transfer)
    filled = torch.empty(piece.num_bytes, dtype=torch.uint8)
    PieceFiles().read(piece, filled)
    assert torch.equal(filled.view(torch.bfloat16), tensor[3:20])


@pytest.mark.parametrize("source", [(slice(0, 40), slice(0, 24)), (slice(0, 40), slice(8, 16))])
def test_a_short_file_is_named_with_its_tensor(source: tuple[slice, ...], tmp_path: Path) -> None:
    tensor = values(40, 24, dtype=torch.float32)
    path = write(tmp_path / "shard", tensor, offset=8)
    path.write_bytes(path.read_bytes()[:-100])
    transfer = Transfer("model.norm.weight", path, 8, torch.float32, (40, 24), source, tensor[source].clone())
    (piece,) = pieces_of(transfer)
    with pytest.raises(CheckpointError, match=r"'shard' is truncated: tensor 'model\.norm\.weight'"):
        PieceFiles().read(piece, torch.empty(piece.num_bytes, dtype=torch.uint8))


def test_a_file_that_the_volume_cannot_read_is_named_with_its_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    tensor = values(4, 6, dtype=torch.float32)
    source = (slice(0, 4), slice(0, 6))
    transfer = Transfer("model.norm.weight", write(tmp_path / "shard", tensor, offset=8), 8, torch.float32, (4, 6), source, tensor.clone())
    (piece,) = pieces_of(transfer)
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CheckpointError, match=r"'shard' cannot be read at tensor 'model\.norm\.weight': Input/output error"):
        PieceFiles().read(piece, torch.empty(piece.num_bytes, dtype=torch.uint8))


# ---- the way to a GPU, with the CPU in its place: what is left of it are threads, buffers and conversions


class _Nothing:
    """A stream or an event where nothing is ever under way."""

    def __init__(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, stream: object) -> None: ...


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    for name in ("Stream", "Event", "set_device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _Nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(staging, "_BUFFER_BYTES", 256)


def _transfers(folder: Path) -> tuple[list[Transfer], list[torch.Tensor]]:
    """Plain, converted, spread out, cut: destinations that are zero, and what they should hold."""
    whole = slice(0, 40), slice(0, 24)
    matrix, half = values(40, 24, dtype=torch.float32), values(40, 24, dtype=torch.bfloat16)
    first, second = write(folder / "a", matrix, offset=8), write(folder / "b", half, offset=13)
    wide = torch.zeros(40, 60)
    transfers = [
        Transfer("plain", first, 8, torch.float32, (40, 24), whole, torch.zeros(40, 24)),
        Transfer("converted", second, 13, torch.bfloat16, (40, 24), whole, torch.zeros(40, 24)),
        Transfer("spread", first, 8, torch.float32, (40, 24), whole, wide[:, 10:34]),
        Transfer("cut", second, 13, torch.bfloat16, (40, 24), (slice(3, 30), slice(4, 9)), torch.zeros(27, 5, dtype=torch.bfloat16)),
    ]
    return transfers, [matrix, half.float(), matrix, half[3:30, 4:9]]


@pytest.mark.usefixtures("no_gpu")
def test_transfers_begin_by_themselves_and_fill_their_destinations(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    transfers, expected = _transfers(tmp_path)
    staged, seen = StagedTransfers(transfers), list[int]()
    deadline = time.monotonic() + 60
    while not torch.equal(transfers[0].destination, expected[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert torch.equal(transfers[0].destination, expected[0]), "nobody has waited for it yet"
    staged.wait(seen.append)
    assert all(torch.equal(transfer.destination, tensor) for transfer, tensor in zip(transfers, expected, strict=True))
    assert sum(seen) == sum(transfer.num_bytes for transfer in transfers)
    assert sys.getswitchinterval() == interval
    staged.cancel()


@pytest.mark.usefixtures("no_gpu")
def test_a_short_file_ends_the_transfers_with_its_name(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    transfers, _ = _transfers(tmp_path)
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:500])
    staged = StagedTransfers(transfers)
    with pytest.raises(CheckpointError, match=r"'b' is truncated: tensor '(converted|cut)'"):
        staged.wait(lambda _: None)
    assert sys.getswitchinterval() == interval
    assert not any(thread.name.startswith("gantline-load") for thread in threading.enumerate())


@pytest.mark.usefixtures("no_gpu")
def test_transfers_that_are_cancelled_read_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = PieceFiles.read
    monkeypatch.setattr(PieceFiles, "read", lambda *given: (time.sleep(0.05), read(*given)))
    transfers, _ = _transfers(tmp_path)
    staged = StagedTransfers(transfers)
    staged.cancel()
    assert sum(future.done() and not future.cancelled() for future in staged._moved) < len(staged._moved)
    assert not any(thread.name.startswith("gantline-load") for thread in threading.enumerate())
