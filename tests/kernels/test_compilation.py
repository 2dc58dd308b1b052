"""Triton's kernels compile for GPUs that are not there: Ampere's generation and Hopper's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compiled import compile_environment

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""A block's shared memory: on the chips between 8.0 and 9.0, and on Hopper."""


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile_within_shared_memory(capability: int) -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_checks", str(capability)]
    result = subprocess.run(command, cwd=ROOT, env=compile_environment(), capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    *kernels, total = result.stdout.splitlines()
    assert total == f"{len(kernels)} kernels"
    sizes = {line.split()[0]: int(line.split()[-1]) for line in kernels}
    assert max(sizes.values()) <= SHARED_BYTES[capability], sizes
