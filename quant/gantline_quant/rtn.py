"""Round to nearest: group-wise asymmetric integers, the arithmetic that every method here ends in, and the baseline AWQ must beat.

For each group of `group_size` consecutive inputs of one output:  scale = (max - min) / 15,  zero = round(-min / scale),
code = clamp(round(w / scale) + zero, 0, 15),  w ~ (code - zero) * scale.  The range always includes 0, so that zero is itself a code, and
the scale is rounded to float16 first, as the checkpoint stores it: what is measured here is what is served.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["QuantizedMatrix", "fake_quantize", "quantize"]

_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class QuantizedMatrix:
    """[N, K] weights (N outputs, K inputs) as integers in groups along K."""

    codes: Tensor
    """uint8 [N, K], 0 to 15."""
    zeros: Tensor
    """uint8 [N, K / group_size], the code of 0."""
    scales: Tensor
    """float16 [N, K / group_size]."""

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        outputs, groups = self.scales.shape
        codes = self.codes.view(outputs, groups, -1).float()
        return ((codes - self.zeros.float().unsqueeze(-1)) * self.scales.float().unsqueeze(-1)).view(outputs, -1)


def quantize(weight: Tensor, group_size: int, bits: int = 4) -> QuantizedMatrix:
    """Nearest codes of float32 `weight` [N, K]; K must be a multiple of `group_size`."""
    codes, zeros, scales = _quantize_groups(weight.unflatten(-1, (-1, group_size)), bits)
    return QuantizedMatrix(codes.flatten(-2).to(torch.uint8), zeros.squeeze(-1).to(torch.uint8), scales.squeeze(-1).to(torch.float16))


def fake_quantize(weight: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """`weight` as it comes back from its codes: `quantize(...).dequantize()`, without making them."""
    return fake_quantize_groups(weight.unflatten(-1, (-1, group_size)), bits).flatten(-2)


def fake_quantize_groups(groups: Tensor, bits: int = 4) -> Tensor:
    """The same for weights that are cut into groups already: float32 [..., group_size]."""
    codes, zeros, scales = _quantize_groups(groups, bits)
    return codes.sub_(zeros).mul_(scales)


def _quantize_groups(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    most = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / most).clamp(min=_SMALLEST_SCALE).half().float()
    zeros = (-low / scales).round_().clamp_(0, most)
    return (groups / scales).round_().add_(zeros).clamp_(0, most), zeros, scales
