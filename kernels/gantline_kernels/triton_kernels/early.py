"""Programmatic dependent launch (Hopper and newer): a kernel that may start before the one ahead of it ends, and waits inside.

Such a kernel reads and writes nothing that others write before its `gdc_wait()`, and every one of its programs calls it: then whoever
waits for this kernel has waited for all before it as well. With `gdc_launch_dependents()` first, its successor may do the same; a chain of
small kernels then costs little more than its work.

One goes further: decode attention (`cuda_kernels/decode_hopper.cu`) reads lengths, tables and all of the cache but each sequence's newest
token before it waits. The kernel ahead of it, which writes that token, therefore launches its dependents after its own wait: all that came
before has ended when decode attention begins. A kernel that does not launch dependents itself keeps to that in any case.

A multiprocessor divides its memory between shared memory and cache as the kernel asks, and must run empty before it divides it anew: two
kernels that ask for different shares never overlap. With a single row, all kernels leave the choice to the driver. From 2 rows on, linear
layers take all the shared memory there is (`cuda_kernels/linear_few_rows.cu`), and so those between them ask for it too, though they need
none; and those layers leave them registers. Up to how many rows that brings more than it costs is measured (docs/perf-log.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from gantline_kernels import library

__all__ = ["MAX_ROWS", "NOT_EARLY", "capability", "early_mode", "launch_options", "launched", "starts_early"]

_HOPPER = (9, 0)
_MAX_PROGRAMS = 2048
"""With more, starting early costs more than it brings: programs that wait take the place of those that work."""
MAX_ROWS = 128
NOT_EARLY, _EARLY, _BESIDE_SHARED = 0, 1, 2
_beside_shared: set[int] = set()
"""Kernels (CUfunctions) that have asked for all shared memory."""


def starts_early(device: torch.device, programs: int) -> bool:
    return programs <= _MAX_PROGRAMS and capability(device) >= _HOPPER


def early_mode(device: torch.device, programs: int, rows: int, *, max_rows: int = MAX_ROWS) -> int:
    """A kernel's EARLY: 0 not, 1 early, 2 early beside linear layers that take all shared memory (a kernel of its own, so compiled)."""
    if rows > max_rows or not starts_early(device, programs):
        return NOT_EARLY
    return _EARLY if rows == 1 else _BESIDE_SHARED


def launch_options(early: int) -> dict[str, Any]:
    """For a Triton kernel's launch. (Chips without it know no such option.)"""
    return {"launch_pdl": True} if early else {}


def launched(kernel: Any, early: int) -> None:
    """After each launch: what Triton returned. The first asks for the shared memory of those that follow."""
    function = getattr(kernel, "function", None)
    if early != _BESIDE_SHARED or function is None or function in _beside_shared:
        return
    _beside_shared.add(function)
    if library.load() is not None:
        library.call("gantline_prefer_shared_memory", function)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for what is no NVIDIA GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else (0, 0)
