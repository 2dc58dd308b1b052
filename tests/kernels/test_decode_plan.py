"""How decode attention cuts a batch: what was measured on a GPU (docs/perf-log.md), as a pure function of its shape."""

from __future__ import annotations

import pytest
from gantline_kernels.hopper_decode import HopperDecodePlan, plan_hopper_decode
from gantline_kernels.triton_kernels.decode import DecodePlan, plan_decode, plan_parts

SMS = 132


@pytest.mark.parametrize(
    ("batch", "longest", "parts"),
    [
        *((1, 32768, 33), (1, 1024, 16), (8, 512, 5)),
        *((16, 512, 1), (16, 1024, 1), (16, 2048, 3), (16, 8192, 3)),
        *((32, 1024, 2), (256, 2048, 1), (256, 8192, 4)),
    ],
)
def test_contexts_are_split_until_the_chip_is_busy_and_no_further(batch: int, longest: int, parts: int) -> None:
    assert plan_parts(batch, 8, longest, SMS)[0] == parts


@pytest.mark.parametrize(
    ("batch", "own", "expected"),
    [
        (256, 2048, DecodePlan(1, 2048, 64, 2, joined=False)),
        (64, 2048, DecodePlan(1, 2048, 64, 4, joined=False)),
        (32, 2048, DecodePlan(2, 64, 64, 8, joined=True)),
        (8, 2048, DecodePlan(5, 64, 32, 16, joined=True)),
        (2, 2048, DecodePlan(17, 64, 16, 16, joined=True)),
        (256, 8192, DecodePlan(4, 2048, 64, 1, joined=True)),
    ],
)
def test_few_parts_of_a_shared_prefix_are_taken_in_and_many_are_joined(batch: int, own: int, expected: DecodePlan) -> None:
    assert plan_decode(batch, 32, 8, 8192, own, SMS) == expected


def test_a_short_prefix_is_not_cut_finer_than_a_part_is_worth() -> None:
    assert plan_decode(8, 32, 8, 2048, 2048, SMS).shared_parts == 16
    assert plan_decode(8, 32, 8, 300, 300, SMS).shared_parts == 2


@pytest.mark.parametrize(
    ("batch", "longest", "expected"),
    [
        (1, 32768, HopperDecodePlan(16, 128, 8)),
        (1, 1024, HopperDecodePlan(8, 128, 8)),
        (1, 1, HopperDecodePlan(1, 128, 8)),
        (4, 8192, HopperDecodePlan(4, 128, 8)),
        (16, 512, HopperDecodePlan(1, 128, 8)),
        (16, 32768, HopperDecodePlan(8, 4096, 8)),
    ],
)
def test_few_sequences_are_cut_into_parts_that_fill_a_hopper_once(batch: int, longest: int, expected: HopperDecodePlan) -> None:
    assert plan_hopper_decode(batch, 8, 128, longest, SMS) == expected
