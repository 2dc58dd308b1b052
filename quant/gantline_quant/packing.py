"""AWQ's public `gemm` layout.

    qweight  int32   [K, N / 8]              codes, 8 outputs a word
    qzeros   int32   [K / group_size, N / 8] codes of 0, packed alike
    scales   float16 [K / group_size, N]

Bits 4i to 4i+3 of word j hold output 8j + ORDER[i]: an order that suited the first kernel's way of unpacking two halves at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gantline_quant.rtn import QuantizedMatrix

__all__ = ["ORDER", "pack", "unpack"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """qweight, qzeros and scales of [N, K] weights; N must be a multiple of 8."""
    return {
        "qweight": _pack_words(matrix.codes.t()),
        "qzeros": _pack_words(matrix.zeros.t()),
        "scales": matrix.scales.t().contiguous(),
    }


def unpack(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedMatrix:
    return QuantizedMatrix(_unpack_words(qweight).t(), _unpack_words(qzeros).t(), scales.t())


def _pack_words(codes: Tensor) -> Tensor:
    """uint8 [R, N] -> int32 [R, N / 8]."""
    nibbles = codes.unflatten(-1, (-1, 8))[..., list(ORDER)].to(torch.int64)
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = (nibbles << shifts).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32).contiguous()  # the top nibble reaches the sign bit


def _unpack_words(words: Tensor) -> Tensor:
    shifts = torch.tensor([4 * ORDER.index(column) for column in range(8)], dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(-2).to(torch.uint8)
