"""What is remembered of the kernels' checks: answers of runs that succeeded, for as long as nothing changes that they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels import remembered
from tests.kernels.remembered import run_check

COUNT = """
import os, pathlib, sys
runs = pathlib.Path(sys.argv[1])
runs.write_text(runs.read_text() + "x")
print(len(runs.read_text()), os.environ.get("WORD"))
sys.exit(os.environ.get("WORD") == "fail")
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GANTLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GANTLINE_FULL_MATRIX", raising=False)
    file = tmp_path / "runs"
    file.touch()
    return file


def test_a_check_that_succeeded_is_run_again_only_when_something_changed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [run_check("-c", COUNT, str(runs), WORD=word) for word in ("a", "a", "b", "a")] == ["1 a\n", "1 a\n", "2 b\n", "1 a\n"]
    monkeypatch.setattr(remembered, "_sources", lambda: "others")
    assert run_check("-c", COUNT, str(runs), WORD="a") == "3 a\n"
    monkeypatch.setenv("GANTLINE_FULL_MATRIX", "1")
    assert run_check("-c", COUNT, str(runs), WORD="a") == "4 a\n"


def test_a_failure_is_not_remembered_and_no_setting_of_the_caller_reaches_a_check(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        with pytest.raises(AssertionError, match=f"{number} fail"):
            run_check("-c", COUNT, str(runs), WORD="fail")
    monkeypatch.setenv("TRITON_PRINT_AUTOTUNING", "1")
    assert "TRITON_PRINT" not in run_check("-c", "import os; print(sorted(os.environ))")


def test_every_source_of_the_kernels_and_their_checks_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gantline_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(remembered.gantline_kernels, "__file__", str(package / "__init__.py"))
    seen = set()
    for name in ("a.py", "deep/b.cu", "c.cuh", "d.json", "e.c"):
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text("one")
        seen.add(remembered._sources.__wrapped__())
    (package / "deep/b.cu").write_text("two")
    seen.add(remembered._sources.__wrapped__())
    assert len(seen) == 6
