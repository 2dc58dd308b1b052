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
    _check("triton", "-k", part, "tests/kernels/kernel_checks.py")


@pytest.mark.parametrize("part", ["attention and not shared", "linear or awq or wider"])
def test_so_do_those_whose_rows_depend_on_themselves_alone(part: str) -> None:
    _check("invariant_triton", "-k", part, "tests/kernels/kernel_checks.py")


def test_rows_depend_on_themselves_alone_to_the_last_bit() -> None:
    _check("invariant_triton", "tests/kernels/invariance_checks.py")


def _check(backend: str, *arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "GANTLINE_KERNEL_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-n0"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
