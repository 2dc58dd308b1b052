"""The suite's own runner: what it does about a test that fails."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAILS_ONCE = """
from pathlib import Path
import pytest

TRIED = Path(__file__).with_suffix(".tried")

def test_that_is_steady():
    with TRIED.open("a") as file:
        file.write("steady\\n")

def test_that_fails_once():
    before = TRIED.read_text()
    with TRIED.open("a") as file:
        file.write("unsteady\\n")
    assert "unsteady" in before
"""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "scripts/run_tests.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a second each
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


def run(runner: Any, tmp_path: Path, tests: str, monkeypatch: pytest.MonkeyPatch) -> int:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "test_it.py"]
    monkeypatch.setattr(runner, "streams", lambda arguments, files=None: {"one": [*command, *arguments]})
    return int(runner.main([]))


def test_the_file_of_what_fails_once_is_run_again_and_the_test_named(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(runner, tmp_path, FAILS_ONCE, monkeypatch) == 0
    assert (tmp_path / "test_it.tried").read_text().split() == ["steady", "unsteady"] * 2
    said = capsys.readouterr().out
    assert "unsteady, failed once of two runs:\n    test_it.py::test_that_fails_once\n" in said and "one, again" in said


@pytest.mark.parametrize(
    "tests",
    ["def test_that_fails():\n    assert False\n", *(f"import pytest\n{text}" for text in (
        "def test_that_cannot_be_set_up(nothing_of_that_name):\n    pass\n",
        "from pathlib import Path\nTRIED = Path(__file__).with_suffix('.tried')\n"
        "@pytest.mark.parametrize('number', range(4))\ndef test_more_than_a_few(number):\n    before = TRIED.exists()\n"
        "    if number == 3:\n        TRIED.touch()\n    assert before\n",
        "def broken(:\n",
    ))],
    ids=["fails-twice", "cannot-be-set-up", "more-than-a-few", "cannot-be-collected"],
)  # fmt: skip
def test_what_is_broken_fails_the_suite(runner: ModuleType, tmp_path: Path, tests: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(runner, tmp_path, tests, monkeypatch) == 1


def test_what_its_processes_import_is_compiled_once(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "imported.py").write_text("")
    assert run(runner, tmp_path, "import sys\nsys.path.insert(0, '.')\ndef test_it():\n    import imported\n", monkeypatch) == 0
    assert list((tmp_path / "__pycache__").glob("imported.*.pyc"))
