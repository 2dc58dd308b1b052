"""Choosing tokens by `cuda_kernels/sampling_hopper.cu`, of long rows by `sampling_long_hopper.cu`: which logits they take, their launches.

Which of the two is a matter of a row's length alone: their sums differ by rounding, so that a choice by anything else would have a row's
token depend on its neighbours.
"""

from __future__ import annotations

from functools import cache

import torch

from gantline_kernels import library

__all__ = ["LONG_ROW", "fits_hopper_sample", "hopper_sample", "sample_in_cluster", "sample_long"]

LONG_ROW = 65536
"""Rows of at least so many logits are long: 128256 were measured to gain by it (docs/perf-log.md, "Sampling of long rows")."""
_MAX_SIZE = 524288
_MAX_ROWS = 65535
_ROWS_AT_ONCE = 256
"""About one wave of blocks; bounds the scratch memory: 62 KB a row of 128256, 74 KB of the longest."""
_LATE_ROWS = range(5, 192)
"""For so many rows, launches that begin before the one ahead has ended take multiprocessors from it (measured: 8 to 128); one row gains,
and so do 256."""
_ALL_LAUNCHES, _EARLY = 7, 8
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def fits_hopper_sample(logits: torch.Tensor) -> bool:
    """Whether the kernels can take these; the caller knows whether they are built, and the chip."""
    return logits.dtype in _TYPES and 1 <= logits.shape[0] <= _MAX_ROWS and logits.shape[1] <= _MAX_SIZE and logits.stride(1) == 1


def hopper_sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """`api.sample` for what `fits_hopper_sample`."""
    run = sample_long if logits.shape[1] >= LONG_ROW else sample_in_cluster
    return run(logits, uniforms, temperature, top_k, top_p, min_p)


def sample_in_cluster(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """In one launch, for rows of at most 409600 logits."""
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    inputs = _contiguous(uniforms, temperature, top_k, top_p, min_p)
    library.call(
        "gantline_sample_hopper", _TYPES[logits.dtype], logits.data_ptr(), logits.stride(0), *map(_at, inputs), out.data_ptr(), rows, size,
        torch.cuda.current_stream(logits.device).cuda_stream,
    )  # fmt: skip
    return out


def sample_long(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    *,
    early: bool | None = None,
) -> torch.Tensor:
    """In three launches for each 256 rows, for rows of 1024 to 524288 logits.

    `early` is for tuning: whether a launch may begin before the one ahead has ended; results are the same. What the launches hand on is at
    most 19 MB, taken from torch's allocator for the call: nothing of it need be there before or outlives it, so graphs may capture it.
    """
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    inputs = _contiguous(uniforms, temperature, top_k, top_p, min_p)
    scratch = torch.empty(_scratch_bytes(min(rows, _ROWS_AT_ONCE), size), dtype=torch.uint8, device=logits.device)
    stream = torch.cuda.current_stream(logits.device).cuda_stream
    for first in range(0, rows, _ROWS_AT_ONCE):
        count = min(rows - first, _ROWS_AT_ONCE)
        overlap = count not in _LATE_ROWS if early is None else early
        library.call(
            "gantline_sample_long", _TYPES[logits.dtype], _at(logits, first), logits.stride(0), *(_at(x, first) for x in inputs),
            _at(out, first), scratch.data_ptr(), count, size, _ALL_LAUNCHES | _EARLY * overlap, stream,
        )  # fmt: skip
    return out


@cache
def _scratch_bytes(rows: int, size: int) -> int:
    built = library.load()
    assert built is not None
    return int(built.gantline_sample_long_scratch(rows, size))


def _contiguous(
    uniforms: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """In the kernels' types and order."""
    uniforms, temperature = uniforms.float().contiguous(), temperature.float().contiguous()
    top_p, min_p = (None if x is None else x.float().contiguous() for x in (top_p, min_p))
    return uniforms, temperature, None if top_k is None else top_k.int().contiguous(), top_p, min_p


def _at(tensor: torch.Tensor | None, row: int = 0) -> int | None:
    """A row's address."""
    return None if tensor is None else tensor.data_ptr() + row * tensor.stride(0) * tensor.element_size()
