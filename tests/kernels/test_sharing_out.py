"""The parts that GPU checks run in are every test once, and one that fails is heard of."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.kernels.sharing_out import run_in_parts

CASES = """
import pathlib, pytest
@pytest.mark.parametrize("number", range(7))
def test_it(number):
    (pathlib.Path(__file__).parent / f"ran-{number}-{pathlib.os.getpid()}").touch()
    assert number != 5 or pathlib.os.environ["FAILING"] == "no"
"""


@pytest.mark.parametrize("failing", ["no", "yes"])
def test_parts_run_every_test_once(tmp_path: Path, failing: str) -> None:
    file = tmp_path / "test_cases.py"
    file.write_text(CASES)
    said = run_in_parts([str(file)], 3, os.environ | {"FAILING": failing}, seconds=120)
    ran = [path.name.split("-") for path in tmp_path.glob("ran-*")]
    assert sorted(int(number) for _, number, _ in ran) == list(range(7))
    assert len({process for *_, process in ran}) == 3
    assert (said == "") == (failing == "no") and len(re.findall(r"^FAILED .*test_it\[5\]", said, re.MULTILINE)) == (failing == "yes")
