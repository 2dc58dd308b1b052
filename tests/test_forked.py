"""The processes in which the suite runs its tests: nothing that fails goes unseen."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "test_a.py": """
import os, pathlib, pytest
@pytest.fixture(scope="module")
def place():
    yield os.getpid()
    pathlib.Path("ended-a").write_text(str(os.getpid()))
def test_one(place, tmp_path):
    print("said by one")
    assert tmp_path.is_dir() and place == os.getpid()
def test_two(place):
    assert place == os.getpid(), "a file stays in one process"
    assert os.getpid() != int(os.environ["OUTER"]), "which is not the one that collects"
""",
    "test_b.py": """
import pytest
def test_fails():
    print("said by it")
    assert [1, 2] == [1, 3]
@pytest.mark.skip(reason="for a reason")
def test_skipped():
    pass
@pytest.mark.xfail
def test_expected():
    assert False
""",
    "test_c.py": "import os\ndef test_dies():\n    os._exit(9)\ndef test_after():\n    pass\n",
    "test_d.py": "import pytest\n@pytest.fixture\ndef broken():\n    raise OSError('no set-up')\ndef test_d(broken):\n    pass\n",
    "test_e.py": "def test_e():\n    pass\n",
}


def start(tmp_path: Path, files: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    own = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "OUTER": "0", "GANTLINE_CACHE": str(tmp_path / "cache")}
    environment = {**os.environ, **own}
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "tests.forked", "--forks=2", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # who runs in the background ignores it
    )  # fmt: skip


def run(tmp_path: Path, files: dict[str, str], *arguments: str) -> tuple[int, str]:
    with start(tmp_path, files, *arguments) as process:
        said = process.communicate(timeout=120)[0]
    return process.returncode, said


def test_results_are_those_of_the_tests(tmp_path: Path) -> None:
    code, said = run(tmp_path, {name: FILES[name] for name in ("test_a.py", "test_b.py", "test_d.py", "test_e.py")}, "--durations=3")
    assert code == 1
    assert re.search(r"1 failed, 3 passed, 1 skipped, 1 xfailed, 1 error", said), said
    assert "FAILED test_b.py::test_fails - assert [1, 2] == [1, 3]" in said and "ERROR test_d.py::test_d - OSError: no set-up" in said
    assert "said by it" in said and "said by one" not in said and "for a reason" in said
    assert "slowest 3 durations" in said and "[100%]" in said
    assert (tmp_path / "ended-a").exists(), "fixtures of a module end with it"


def test_all_that_pass_are_a_success_and_none_is_told_apart(tmp_path: Path) -> None:
    files = {name: FILES[name] for name in ("test_a.py", "test_e.py")}
    code, said = run(tmp_path, files)
    assert code == 0 and "3 passed" in said
    assert run(tmp_path, files, "-k", "nothing")[0] == 5


def test_a_process_that_dies_fails_its_test_and_what_it_left(tmp_path: Path) -> None:
    code, said = run(tmp_path, {name: FILES[name] for name in ("test_c.py", "test_e.py")})
    assert code == 1 and "2 failed, 1 passed" in said, said
    assert "test_c.py::test_dies the process that ran it ended with exit code 9" in said
    assert "test_c.py::test_after was not run" in said


def test_what_cannot_be_collected_is_an_error(tmp_path: Path) -> None:
    code, said = run(tmp_path, {"test_e.py": FILES["test_e.py"], "test_f.py": "import nothing\n"})
    assert code == 2 and "ERROR test_f.py" in said and "passed" not in said


def test_the_first_failure_ends_the_run_if_that_is_asked_for(tmp_path: Path) -> None:
    slow = "import time\ndef test_slow():\n    time.sleep(1)\n"
    files = {"test_b.py": FILES["test_b.py"], **{f"test_s{i}.py": slow for i in range(20)}}
    began = time.monotonic()
    code, said = run(tmp_path, files, "-x")
    assert code == 1 and "stopping after 1 failures" in said
    assert time.monotonic() - began < 15


def test_files_that_took_longest_are_handed_out_first(tmp_path: Path) -> None:
    text = "import time\ndef test_it():\n    time.sleep({})\n    with open('order', 'a') as file:\n        print(__name__, file=file)\n"
    files = {"test_a.py": text.format(0.0), "test_b.py": text.format(0.2), "test_c.py": text.format(0.4)}

    def order(*arguments: str) -> list[str]:
        (tmp_path / "order").unlink(missing_ok=True)
        assert run(tmp_path, files, "--forks=1", *arguments)[0] == 0
        return [line[-1] for line in (tmp_path / "order").read_text().split()]

    assert order() == ["a", "b", "c"]
    assert order("-k", "test_c") == ["c"]
    assert order() == ["c", "b", "a"]
    files["test_d.py"] = text.format(0.0)
    assert order() == ["d", "c", "b", "a"], "of a new one nobody knows"


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_an_interrupt_takes_fixtures_down(tmp_path: Path, number: int) -> None:
    text = """
import pathlib, pytest, time
@pytest.fixture
def place():
    pathlib.Path("here").touch()
    yield
    pathlib.Path("gone").touch()
def test_long(place):
    time.sleep(100)
"""
    with start(tmp_path, {"test_long.py": text, "test_e.py": FILES["test_e.py"]}) as process:
        while not (tmp_path / "here").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "KeyboardInterrupt" in said
    assert (tmp_path / "gone").exists()
