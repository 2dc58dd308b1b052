"""Programs that tests start by a fork: as the interpreter itself starts them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import warm
from tests.runtime.server_process import few_files

PRELOAD = ("fractions",)
SAYS = """
import json, os, resource, sys
environment = sorted(item for item in os.environ.items() if item[0] != "LC_CTYPE")  # which the interpreter itself sets
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
print(json.dumps([sys.argv, os.getcwd(), environment, limits, sys.stdin.read(), __name__]))
print("also this", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_a_program_gets_what_the_interpreter_would_give_it(tmp_path: Path) -> None:
    environment = {"A": "b c", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    arguments = ["-c", SAYS, "7", "--flag=é"]
    with few_files(200):
        plain = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        process = warm.start(arguments, environment, preload=PRELOAD, cwd=Path.cwd())
    with process.stdout, process.stderr:
        assert (process.stdout.read(), process.stderr.read(), process.wait(30)) == (plain.stdout, plain.stderr, plain.returncode)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200 and plain.returncode == 7


@pytest.mark.parametrize(
    "code", ["raise ValueError('x')", "import sys; sys.exit('words')", "import sys; sys.exit()", "import os; os._exit(3)", "import nothing"]
)
def test_it_ends_as_under_the_interpreter(code: str) -> None:
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    done = warm.run(["-c", code], os.environ, preload=PRELOAD, timeout_s=60)
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout)
    assert done.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


def test_a_module_is_run_as_one() -> None:
    arguments = ["-m", "json.tool", "--help"]
    plain = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    done = warm.run(arguments, os.environ, preload=PRELOAD, timeout_s=60)
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr) and plain.stdout


def test_what_runs_at_the_end_runs_and_threads_are_waited_for() -> None:
    thread = "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()"
    code = f"import atexit, threading, time\natexit.register(print, 'end')\n{thread}"
    assert warm.run(["-c", code], os.environ, preload=PRELOAD, timeout_s=60).stdout.split() == ["thread", "end"]


def test_the_preloaded_module_is_there_and_each_program_has_its_own() -> None:
    code = "import sys; module = sys.modules['fractions']; print(getattr(module, 'mark', None)); module.mark = 1"
    for _ in range(2):
        assert warm.run(["-c", code], os.environ, preload=PRELOAD, timeout_s=60).stdout == "None\n"


def test_temporary_files_lie_where_its_environment_says(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = warm.run(
        ["-c", "import tempfile; print(tempfile.gettempdir())"], environment, preload=("tests.looks_for_a_folder",), timeout_s=60
    )
    assert done.stdout.strip() == str(tmp_path), done.stderr


def test_signals_reach_it_and_its_end_is_told() -> None:
    process = warm.start(["-c", "import time; print('here', flush=True); time.sleep(60)"], os.environ, preload=PRELOAD)
    with process.stdout, process.stderr:
        assert process.stdout.readline() == "here\n" and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.kill()
        assert process.wait(30) == process.poll() == -signal.SIGKILL
        assert process.stdout.read() == "", "nobody else holds its output open"
    process.kill()  # of a process that is gone: nothing


def test_one_that_takes_too_long_is_killed() -> None:
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run(["-c", "import time; time.sleep(600)"], os.environ, preload=PRELOAD, timeout_s=0.5)
    assert time.monotonic() - began < 60


def test_programs_end_in_any_order_and_hold_nothing_of_each_other() -> None:
    code = "import sys, time; time.sleep(float(sys.argv[1])); print(sys.argv[1])"
    processes = [warm.start(["-c", code, seconds], os.environ, preload=PRELOAD) for seconds in ("0.6", "0.1", "0.3")]
    said = [(process.stdout.read(), process.wait(30)) for process in reversed(processes)]
    for process in processes:
        process.stdout.close()
        process.stderr.close()
    assert said == [("0.3\n", 0), ("0.1\n", 0), ("0.6\n", 0)]
