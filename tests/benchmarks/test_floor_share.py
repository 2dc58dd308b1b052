"""Floors of a decode step, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
from gantline_runtime.checkpoint import parse_shape

from benchmarks.floor_share import FAMILIES, floor_ms

READ = 4.4e12
LLAMA: dict[str, Any] = FAMILIES["Llama-3.1-8B"]
_WEIGHTS = 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096) + 4096 * 128256


def test_one_sequence_pays_for_the_weights_and_for_its_context() -> None:
    weights, context = _WEIGHTS * 2 / READ, 32768 * 131072 / READ
    assert floor_ms(LLAMA, 1, 32768, READ) == pytest.approx((weights + context) * 1e3)
    assert weights * 1e3 == pytest.approx(3.41, abs=0.01)


def test_many_sequences_pay_for_operations_too() -> None:
    products = 2 * 512 * _WEIGHTS / 700e12
    assert floor_ms(LLAMA, 512, 512, READ) == pytest.approx((products + 512 * 512 * 131072 / READ) * 1e3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_are_shapes_that_the_engine_knows(name: str) -> None:
    assert parse_shape(FAMILIES[name]).head_dim == FAMILIES[name]["head_dim"]
