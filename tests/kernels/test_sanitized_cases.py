"""What compute-sanitizer is given leaves no kernel out."""

from __future__ import annotations

import re
from pathlib import Path

import gantline_kernels

from tests.kernels.remembered import run_check

KERNELS = Path(gantline_kernels.__file__).parent
_NAMES = """
import torch
from gantline_kernels.triton_kernels import linear
from triton.runtime.jit import JITFunction
from tests.kernels import sanitized_cases

launched = set()
torch.empty = torch.zeros  # tokens that nothing has chosen must be tokens
JITFunction.run = lambda self, *args, **kwargs: launched.add(self.__name__)
linear.has_one_row_linear = __import__("gantline_kernels.triton_backend").triton_backend.has_one_row_linear = lambda x, weight: len(x) == 1
sanitized_cases.DEVICE = "cpu"
for backend in ("triton", "invariant_triton"):
    for case in sanitized_cases.CASES[backend]:
        case(backend)
print(*sorted(launched))
"""


def test_the_sanitizer_sees_every_triton_kernel() -> None:
    files = (KERNELS / "triton_kernels").glob("*.py")
    kernels = {name for file in files for name in re.findall(r"^ +(?:kernel = )?(\w+)\[[^\n]+\]\(", file.read_text(), re.M)}
    assert len(kernels) > 15
    assert set(run_check("-c", _NAMES).split()) == kernels


def test_the_sanitizer_is_run_with_every_backend_that_has_cases() -> None:
    from tests.kernels.sanitized_cases import CASES

    script = (Path(__file__).parents[2] / "scripts/sanitize_kernels.sh").read_text()
    assert set(re.findall(r"^check memcheck (\w+)", script, re.M)) == set(CASES)
