"""Every kernel against its reference on a GPU: `kernel_checks.py` once for each backend that has kernels."""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.sharing_out import run_in_parts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("backend", ["triton", "cuda", "invariant_triton"])
def test_kernels_equal_their_references(backend: str) -> None:
    files = ["tests/kernels/kernel_checks.py"] + ["tests/kernels/invariance_checks.py"] * (backend == "invariant_triton")
    parts = min(14, os.cpu_count() or 1)  # compiling takes most of the time
    assert run_in_parts(files, parts, os.environ | {"GANTLINE_KERNEL_BACKEND": backend}, seconds=550) == ""
