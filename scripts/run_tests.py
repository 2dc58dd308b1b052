"""The whole suite, as `make test` runs it: streams beside each other, since some wait most of the time and others compute.

    check        lint, types, import contracts
    node         what owns the one-node cluster, one test after the other
    api-server   what talks to a real API server; two workers with an API server each, since these tests wait half of the time
    rest         everything else, a worker more than there are cores since some wait, yielding to those that wait for somebody's deadline

The workers of a stream are forks of the process that has collected its tests (tests/forked.py).
Each stream tells how far it is, and its output is printed whole when it ends. Arguments go to every pytest:
`scripts/run_tests.py -k scale`.

Most of these tests are real servers and clusters that share two cores. When all streams have ended, the files of what failed are run once
more with the machine to themselves: a test that fails once is named as unsteady, to be mended, and does not fail the suite; more than
UNSTEADY_LIMIT do, and so does one that fails twice.
Exit code 0 where all streams passed, or what failed passed so.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=5"]
FORKS = ["-p", "tests.forked"]
"""Workers that need not collect the tests each."""
API_SERVER = ("devcluster", "operator", "gateway")
TESTS_FAILED, NOTHING_SELECTED = 1, 5
UNSTEADY_LIMIT = 3
SHARE = re.compile(r"\[ *(\d+%)\]$")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def streams(arguments: list[str], files: list[str] | None = None) -> dict[str, list[str]]:
    """Each stream's command, over `files` or all of its tests. Where the marked tests live is held by tests/conftest.py."""
    workers, apart = [[*FORKS, f"--forks={count}"] for count in (min(4, 1 + (os.cpu_count() or 1)), 2)]
    api_server = [f"tests/{part}" for part in API_SERVER]
    commands = {
        "node": [*PYTEST, *(files or ["tests/e2e", "tests/devcluster"]), "-m", "node and not gpu", *arguments],
        "api-server": [*PYTEST, *apart, *(files or api_server), "-m", "apiserver and not node and not gpu", *arguments],
        "rest": ["nice", "-n", "2", *PYTEST, *workers, *(files or ["tests"]), "-m", "not apiserver and not node and not gpu", *arguments],
    }
    return commands if arguments or files else {"check": ["make", "--no-print-directory", "check"], **commands}


class Stream(threading.Thread):
    """Runs one command in a process group of its own, and prints what it said once it has ended."""

    printing = threading.Lock()

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        super().__init__(name=name)
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, text=True, errors="replace",
        )  # fmt: skip
        self._began = time.monotonic()
        self.output = ""
        self.code = -1
        self.seconds = 0.0

    def run(self) -> None:
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if share := SHARE.search(line):
                self._say(f"{self.name:10} {share[1]:>4}")
        self.code, self.seconds, self.output = self._process.wait(), time.monotonic() - self._began, "".join(lines)
        self._say(f"\n===== {self.name}: exit code {self.code} after {self.seconds:.0f} s\n{self.output.rstrip()}\n")

    @property
    def failed(self) -> list[str]:
        """The tests that failed, or could not be set up, as pytest's summary names them."""
        return FAILED.findall(self.output) if self.code == TESTS_FAILED else []

    def _say(self, text: str) -> None:
        with self.printing:
            print(text, flush=True)

    def interrupt(self) -> None:
        """As Ctrl-C would: pytest takes its fixtures down, and with them their clusters."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)


def run_again(failed: list[Stream], environment: dict[str, str], begun: Callable[[Stream], None]) -> list[Stream]:
    """Run the files of what failed once more, one stream after the other. Returns the streams that have failed for good.

    Whole files: some tell one story from test to test.
    """
    unsteady = {test for stream in failed for test in stream.failed}
    if not all(stream.failed for stream in failed) or len(unsteady) > UNSTEADY_LIMIT:
        return failed
    for stream in failed:
        files = sorted({test.partition("::")[0] for test in stream.failed})
        again = Stream(f"{stream.name}, again", streams([], files)[stream.name], environment)
        begun(again)
        again.start()
        again.join()
        twice = set(stream.failed) & set(again.failed)
        if twice or (again.code and not again.failed):
            return [again]
        unsteady |= set(again.failed)
    print("unsteady, failed once of two runs:", *sorted(unsteady), sep="\n    ")
    return []


def main(arguments: list[str]) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would each compile what they import
    running: list[Stream] = []
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        for stream in running:
            stream.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM):  # before there are children: a signal that is ignored here they would ignore too
        signal.signal(number, interrupt)
    running += [Stream(name, command, environment) for name, command in streams(arguments).items()]
    for stream in running:
        stream.start()
    for stream in running:
        stream.join()
    good = (0, NOTHING_SELECTED) if arguments else (0,)
    failed = [stream for stream in running if stream.code not in good]
    if failed and not arguments and not interrupted.is_set():
        failed = run_again(failed, environment, running.append)
    print(", ".join(f"{stream.name} {stream.seconds:.0f} s" for stream in running))
    print(f"failed: {', '.join(stream.name for stream in failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
