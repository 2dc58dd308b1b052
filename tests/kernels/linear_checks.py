"""The linear kernel for one row against float32, at edge shapes.

Not collected by itself: `test_linear.py` runs this file under Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from gantline_kernels import reference
from gantline_kernels.triton_kernels.linear import one_row_linear

from tests.kernels.cases import largest_error
from tests.kernels.kernel_checks import TOLERANCE  # and the interpreter, made to work

DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (4, 64), (5, 64), (70, 96), (33, 200), (8, 520), (3, 7)])
def test_one_row(outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    x, b = torch.randn(3, inputs + 8).to(dtype)[1:2, :inputs], torch.randn(outputs).to(dtype) if bias else None
    got = one_row_linear(x, weight, b, depth=64)
    assert got.dtype == dtype
    assert largest_error(got, reference.linear(x, weight, b)) < TOLERANCE[dtype]


@pytest.mark.parametrize("outputs_each", [1, 2, 16])
@pytest.mark.parametrize("depth", [16, 128, 2048])
def test_one_row_at_every_tile(outputs_each: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 144), torch.randn(37, 144) / 12
    got = one_row_linear(x, weight, None, outputs_each=outputs_each, depth=depth)
    assert largest_error(got, reference.linear(x, weight)) < TOLERANCE[torch.float32]


def test_one_row_with_results_wider_than_inputs() -> None:
    x, weight = (torch.randn(n, 64).to(torch.float16) for n in (1, 40))
    got = one_row_linear(x, weight, None, torch.float32)
    assert got.dtype == torch.float32
    assert largest_error(got, reference.linear(x, weight)) < 1e-4


def test_one_row_repeats_itself_and_reads_nothing_beside_its_row() -> None:
    rows, weight = torch.full((3, 96), torch.nan), torch.randn(10, 96)
    rows[1] = torch.randn(96)
    first = one_row_linear(rows[1:2], weight, None, depth=64)
    assert torch.isfinite(first).all()
    assert torch.equal(first, one_row_linear(rows[1:2].clone(), weight, None, depth=64))
