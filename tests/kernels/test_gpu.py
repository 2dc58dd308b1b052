"""Every kernel against its reference on a GPU: `kernel_checks.py` once for each backend that has kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("backend", ["triton", "cuda", "invariant_triton"])
def test_kernels_equal_their_references(backend: str) -> None:
    environment = os.environ | {"GANTLINE_KERNEL_BACKEND": backend}
    workers = str(min(8, os.cpu_count() or 1))  # compiling takes most of the time
    files = "tests/kernels/kernel_checks.py" + (" tests/kernels/invariance_checks.py" if backend == "invariant_triton" else "")
    options = f"-m pytest -q -n {workers} -p no:cacheprovider --noconftest {files}"
    command = [sys.executable, *options.split()]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
