"""Programmatic dependent launch (Hopper and newer): a kernel that may start before the one ahead of it ends, and waits inside.

Such a kernel reads and writes nothing that others write before its `gdc_wait()`, and every one of its programs calls it: then whoever
waits for this kernel has waited for all before it as well. With `gdc_launch_dependents()` first, its successor may do the same; a chain of
small kernels then costs little more than its work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

__all__ = ["capability", "launch_options", "starts_early"]

_HOPPER = (9, 0)
_MAX_PROGRAMS = 2048
"""With more, starting early costs more than it brings: programs that wait take the place of those that work."""


def starts_early(device: torch.device, programs: int) -> bool:
    return programs <= _MAX_PROGRAMS and capability(device) >= _HOPPER


def launch_options(early: bool) -> dict[str, Any]:
    """For a Triton kernel's launch. (Chips without it know no such option.)"""
    return {"launch_pdl": True} if early else {}


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for what is no NVIDIA GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else (0, 0)
