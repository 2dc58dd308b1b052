"""Triton's kernels compile for GPUs that are not there: Ampere's generation, Hopper's, and the newest without Hopper's shared memory."""

from __future__ import annotations

import pytest

from tests.kernels.remembered import run_check

SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""A block's shared memory: on the chips between 8.0 and 9.0, on Hopper, and on chips of 12.0."""


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_triton_kernels_compile_within_shared_memory(capability: int) -> None:
    *kernels, total = run_check("-m", "tests.kernels.compile_checks", str(capability)).splitlines()
    assert total == f"{len(kernels)} kernels"
    sizes = {line.split()[0]: int(line.split()[-1]) for line in kernels}
    assert max(sizes.values()) <= SHARED_BYTES[capability], sizes
