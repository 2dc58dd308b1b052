"""Reading weights in pieces, as it is done for a GPU: what lands in the buffers is what the tensor holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gantline_runtime import staging
from gantline_runtime.errors import CheckpointError
from gantline_runtime.staging import PieceFiles, Transfer, pieces_of

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
