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


def test_those_whose_rows_depend_on_themselves_alone_do_so_to_the_last_bit_and_equal_the_references() -> None:
    """Compared with the references in one case of each kind: the kernels have few branches, and what decides is the GPU's."""
    part = "head_dimension and dtype1 or 20-5.0 or 128-chunks1-decodes2 or wider or awq and dtype1 or invariance_checks"
    files = ("tests/kernels/kernel_checks.py", "tests/kernels/invariance_checks.py")
    _check("invariant_triton", "-k", f"({part}) and not shared", *files)


def _check(backend: str, *arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "GANTLINE_KERNEL_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest", "-n0"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
