"""What launches ask of the device they run on."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["num_sms"]


@cache
def num_sms(index: int | None) -> int:
    """Multiprocessors of the GPU `index`; 4 for None, which is no GPU (Triton's interpreter)."""
    return 4 if index is None else torch.cuda.get_device_properties(index).multi_processor_count
