"""Triton's kernels on the CPU: `kernel_checks.py` under the interpreter, in processes that other tests do not share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["attention and not shared", "shared", "not attention and not shared"])
def test_triton_kernels_equal_their_references_under_the_interpreter(part: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "GANTLINE_KERNEL_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-n0", "-k", part]
    command = [sys.executable, "-m", "pytest", *options, "tests/kernels/kernel_checks.py"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
