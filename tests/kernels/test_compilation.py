"""Triton's kernels compile for GPUs that are not there: Ampere's generation and Hopper's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from gantline_kernels.build import cache_folder

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""A block's shared memory: on the chips between 8.0 and 9.0, and on Hopper."""


@pytest.fixture(scope="module")
def compiled() -> Path:
    """What these very sources compiled to, kept between runs: two minutes of work otherwise. Other sources' is removed."""
    digest = hashlib.sha256(triton.__version__.encode())
    for source in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(source.read_bytes())
    folder = cache_folder() / "compiled-in-tests" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile_within_shared_memory(capability: int, compiled: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(compiled)}
    command = [sys.executable, "-m", "tests.kernels.compile_checks", str(capability)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    *kernels, total = result.stdout.splitlines()
    assert total == f"{len(kernels)} kernels"
    sizes = {line.split()[0]: int(line.split()[-1]) for line in kernels}
    assert max(sizes.values()) <= SHARED_BYTES[capability], sizes
