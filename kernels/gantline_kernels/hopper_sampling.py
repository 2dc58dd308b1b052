"""Choosing tokens by `cuda_kernels/sampling_hopper.cu`: which logits it takes, its launch."""

from __future__ import annotations

import torch

from gantline_kernels import library

__all__ = ["fits_hopper_sample", "hopper_sample"]

_MAX_SIZE = 409600
_MAX_ROWS = 65535
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def fits_hopper_sample(logits: torch.Tensor) -> bool:
    """Whether the kernel can take these; the caller knows whether it is built, and the chip."""
    return logits.dtype in _TYPES and 1 <= logits.shape[0] <= _MAX_ROWS and logits.shape[1] <= _MAX_SIZE and logits.stride(1) == 1


def hopper_sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """`api.sample` in one launch, for what `fits_hopper_sample`."""
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    floats = [None if x is None else x.float().contiguous() for x in (uniforms, temperature, top_p, min_p)]
    uniforms_at, temperatures_at, top_ps_at, min_ps_at = (None if x is None else x.data_ptr() for x in floats)
    counts = None if top_k is None else top_k.int().contiguous()
    library.call(
        "gantline_sample_hopper", _TYPES[logits.dtype], logits.data_ptr(), logits.stride(0), uniforms_at, temperatures_at,
        None if counts is None else counts.data_ptr(), top_ps_at, min_ps_at, out.data_ptr(), rows, size,
        torch.cuda.current_stream(logits.device).cuda_stream,
    )  # fmt: skip
    return out
