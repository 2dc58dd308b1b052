"""Group-wise rounding, and the public layout it is stored in."""

from __future__ import annotations

import pytest
import torch
from gantline_quant.packing import pack, unpack
from gantline_quant.rtn import fake_quantize, quantize
from torch import Tensor

CASES = {
    "normal": lambda g: torch.randn(24, 256, generator=g),
    "tiny values": lambda g: torch.randn(8, 128, generator=g) * 1e-7,
    "large values": lambda g: torch.randn(8, 128, generator=g) * 1e3,
    "only positive": lambda g: torch.rand(8, 128, generator=g) + 3,
    "only negative": lambda g: -torch.rand(8, 128, generator=g) - 3,
    "zeros": lambda g: torch.zeros(8, 128),
    "one outlier": lambda g: torch.cat([torch.full((8, 1), 50.0), torch.randn(8, 127, generator=g)], dim=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_no_weight_moves_by_more_than_half_a_step(name: str, group_size: int) -> None:
    weight = CASES[name](torch.Generator().manual_seed(1))
    matrix = quantize(weight, group_size)
    error = (matrix.dequantize() - weight).abs().unflatten(-1, (-1, group_size)).amax(-1)
    # Half a step of rounding, and up to half of another where the zero point was rounded and an end is cut off; the scale is a float16.
    assert torch.isfinite(error).all()
    assert (error <= matrix.scales.float() * 1.02 + 1e-7).all()
    assert matrix.codes.max() <= 15 and matrix.zeros.max() <= 15


def test_zero_stays_zero() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    weight[:, ::7] = 0
    assert (quantize(weight, 128).dequantize()[:, ::7] == 0).all()


def test_what_is_measured_is_what_is_stored() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fake_quantize(weight, 64), quantize(weight, 64).dequantize())


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """[K, N] weights, written down from the format's description alone, a nibble at a time.

    AWQ's gemm layout: in each int32, nibble i (from the lowest) is output `8 * word + [0, 2, 4, 6, 1, 3, 5, 7][i]`.
    """
    inputs, words = qweight.shape
    weights = torch.empty(inputs, words * 8)
    for word in range(words):
        for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            n = word * 8 + column
            for k in range(inputs):
                code = (int(qweight[k, word]) >> (4 * nibble)) & 0xF
                zero = (int(qzeros[k // group_size, word]) >> (4 * nibble)) & 0xF
                weights[k, n] = (code - zero) * float(scales[k // group_size, n])
    return weights


def test_an_independent_decoder_reads_the_packed_layout() -> None:
    matrix = quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(4)), 32)
    packed = pack(matrix)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()} == {
        "qweight": (torch.int32, (64, 3)),
        "qzeros": (torch.int32, (2, 3)),
        "scales": (torch.float16, (2, 24)),
    }
    assert torch.equal(decode_awq(**packed, group_size=32).T, matrix.dequantize())


def test_the_engines_kernels_read_the_packed_layout() -> None:
    from gantline_kernels import reference

    matrix = quantize(torch.randn(40, 256, generator=torch.Generator().manual_seed(5)), 128)
    assert torch.equal(reference.awq_dequantize(**pack(matrix), group_size=128).T, matrix.dequantize())


def test_unpacking_undoes_packing() -> None:
    matrix = quantize(torch.randn(16, 128, generator=torch.Generator().manual_seed(6)), 64)
    restored = unpack(**pack(matrix))
    assert torch.equal(restored.codes, matrix.codes) and torch.equal(restored.zeros, matrix.zeros)
    assert torch.equal(restored.scales, matrix.scales)
