"""Triton's kernels on the CPU: `kernel_checks.py` under the interpreter, in processes that other tests do not share."""

from __future__ import annotations

import pytest

from tests.kernels.remembered import run_check


@pytest.mark.parametrize("part", ["attention and not shared", "shared", "not attention and not shared"])
def test_triton_kernels_equal_their_references_under_the_interpreter(part: str) -> None:
    _check("triton", "-k", part, "tests/kernels/kernel_checks.py")


def test_those_whose_rows_depend_on_themselves_alone_do_so_to_the_last_bit_and_equal_the_references() -> None:
    """Compared with the references in one case of each kind: the kernels have few branches, and what decides is the GPU's."""
    part = "head_dimension and dtype1 or 20-5.0 or 128-chunks1-decodes2 or wider or awq and dtype1 or invariance_checks"
    files = ("tests/kernels/kernel_checks.py", "tests/kernels/invariance_checks.py")
    _check("invariant_triton", "-k", f"({part}) and not shared", *files)


def _check(backend: str, *arguments: str) -> None:
    options = ["-q", "-x", "-p", "no:cacheprovider", "--noconftest"]
    run_check("-m", "pytest", *options, *arguments, TRITON_INTERPRET="1", GANTLINE_KERNEL_BACKEND=backend)
