"""Which kernel samples, and in which launches. What they compute is checked on GPUs (`kernel_checks.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gantline_kernels import hopper_sampling, library

LIMITS = (torch.full((600,), 50), torch.full((600,), 0.9), None)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Name and arguments of each call to the library."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(library, "call", lambda *call: calls.append(call))
    monkeypatch.setattr(library, "load", lambda: SimpleNamespace(gantline_sample_long_scratch=lambda rows, size: rows * 1000))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    hopper_sampling._scratch_bytes.cache_clear()
    yield calls
    hopper_sampling._scratch_bytes.cache_clear()


def _sample(rows: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = torch.empty(1, size, dtype=dtype).expand(rows, size)
    assert hopper_sampling.fits_hopper_sample(logits)
    limits = (None if x is None else x[:rows] for x in LIMITS)
    return hopper_sampling.hopper_sample(logits, torch.zeros(rows), torch.ones(rows), *limits)


@pytest.mark.parametrize("rows", [1, 8, 9, 32, 127, 128, 256, 600])
def test_which_kernel_samples_follows_from_the_rows_length_alone(launches: list[tuple[Any, ...]], rows: int) -> None:
    for size in (1000, 32000, 65535, 65536, 128256, 524288):
        _sample(rows, size)
        assert {call[0] for call in launches} == {"gantline_sample_long" if size >= 65536 else "gantline_sample_hopper"}
        launches.clear()
    assert not hopper_sampling.fits_hopper_sample(torch.empty(1, 524289))


def test_many_long_rows_are_sampled_in_turns_of_256_in_the_same_scratch_memory(launches: list[tuple[Any, ...]]) -> None:
    out = _sample(600, 70000)
    *_, outs, scratch, rows, _size, options, _stream = zip(*launches, strict=True)
    assert rows == (256, 256, 88) and len(set(scratch)) == 1
    assert [at - out.data_ptr() for at in outs] == [0, 256 * 8, 512 * 8]
    assert options == (15, 15, 7), "88 rows do not gain by launches that overlap"
