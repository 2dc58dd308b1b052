"""Runs tests in several processes that are forks of one that has collected them: pytest -p tests.forked --forks=3

Collecting this suite takes ten seconds and more, most of them imports, and each worker of pytest-xdist does it anew. Here the process that
pytest was started in collects, forks, hands out files (a process takes the next one when it is through with its own) and reports what the
processes tell of their tests. Each has its own fixtures, those of the session too, and its own folder for temporary files.

Files that took longest when they ran last on this machine are handed out first, so that no long one is left to run alone at the end.

A process that ends in the middle of a test fails that test, and every test that did not run is a failure.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import json
import math
import os
import signal
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest

_NUMBER = struct.Struct("i")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--forks", type=int, default=0, help="processes that run the tests, file by file (0: this one runs them)")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    """Modules and tests stay: no look for garbage in them, neither now, nor in a fork, which would copy each page that it looks at."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    count = session.config.getoption("--forks")
    if not count or session.config.option.collectonly:
        return None
    if session.testsfailed and not session.config.option.continue_on_collection_errors:
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    files = [list(items) for _, items in itertools.groupby(session.items, key=lambda item: _file(item.nodeid))]
    durations = _Durations(session.config)
    files.sort(key=lambda items: -durations.known.get(_file(items[0].nodeid), math.inf))
    forks = _Forks(session, files, min(count, len(files)))
    forks.run()
    durations.keep(forks.seconds)
    return True


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


class _Durations:
    """Seconds that each file's tests with these marks took when they ran last, in $GANTLINE_CACHE or ~/.cache/gantline."""

    def __init__(self, config: pytest.Config) -> None:
        folder = Path(os.environ.get("GANTLINE_CACHE") or Path.home() / ".cache" / "gantline") / "test-durations"
        self._kept = folder / f"{config.option.markexpr or 'all'}.json"
        self._whole = not config.option.keyword and not any("::" in argument for argument in config.args)
        self.known: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            self.known = json.loads(self._kept.read_text())

    def keep(self, seconds: Counter[str]) -> None:
        """For the next run, where files were run whole. An order is no result: nothing is lost where it cannot be written."""
        if self._whole:
            with contextlib.suppress(OSError):
                self._kept.parent.mkdir(parents=True, exist_ok=True)
                partial = self._kept.with_suffix(f".{os.getpid()}")
                partial.write_text(json.dumps(self.known | seconds))
                partial.replace(self._kept)


class _Forks:
    def __init__(self, session: pytest.Session, files: list[list[pytest.Item]], count: int) -> None:
        self._session, self._config, self._files = session, session.config, files
        self._waiting = {item.nodeid: item.location for item in session.items}
        self.seconds: Counter[str] = Counter()
        self._running: dict[Connection, tuple[str, tuple[str, int | None, str]] | None] = {}
        self._pids: dict[Connection, int] = {}
        self._next_file, numbers = os.pipe()  # whoever reads a number runs the file
        os.write(numbers, b"".join(map(_NUMBER.pack, range(len(files)))))
        os.close(numbers)
        scratch = self._config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        for number in range(count):
            ours, theirs = Pipe(duplex=False)
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if not pid:
                for other in self._pids:
                    other.close()
                ours.close()
                _work(session, files, self._next_file, theirs, scratch / f"fork-{number}")
            theirs.close()
            self._pids[ours], self._running[ours] = pid, None

    def run(self) -> None:
        try:
            while self._running:
                for pipe in wait(list(self._running)):
                    assert isinstance(pipe, Connection)
                    try:
                        self._hear(pipe, *pipe.recv())
                    except EOFError:
                        self._end(pipe)
        except KeyboardInterrupt:
            self._stop_handing_out()
            for pid in self._pids.values():
                os.kill(pid, signal.SIGINT)
            raise
        finally:
            self._stop_handing_out()
            for pid in self._pids.values():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        if self._session.shouldfail:
            raise self._session.Failed(self._session.shouldfail)
        for nodeid, location in self._waiting.items():
            self._fail(nodeid, location, "was not run: the process that had its file has ended")

    def _hear(self, pipe: Connection, kind: str, *told: Any) -> None:
        hook = self._config.hook
        if kind == "begins":
            nodeid, location = told
            self._running[pipe] = (nodeid, location)
            self._waiting.pop(nodeid, None)
            hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
        elif kind == "says":
            report = hook.pytest_report_from_serializable(config=self._config, data=told[0])
            self.seconds[_file(report.nodeid)] += report.duration
            hook.pytest_runtest_logreport(report=report)
        else:
            assert kind == "ends"
            nodeid, location = told
            self._running[pipe] = None
            hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
        if self._session.shouldfail:
            self._stop_handing_out()

    def _end(self, pipe: Connection) -> None:
        running = self._running.pop(pipe)
        if running is not None:
            code = os.waitstatus_to_exitcode(os.waitpid(self._pids.pop(pipe), 0)[1])
            self._fail(*running, f"the process that ran it ended with exit code {code}")
            self._config.hook.pytest_runtest_logfinish(nodeid=running[0], location=running[1])

    def _fail(self, nodeid: str, location: tuple[str, int | None, str], words: str) -> None:
        report = pytest.TestReport(nodeid, location, {}, "failed", f"{nodeid} {words}", "call")
        self._config.hook.pytest_runtest_logreport(report=report)

    def _stop_handing_out(self) -> None:
        while os.read(self._next_file, 1 << 16):
            pass


# ---- in a fork


class _Teller:
    """Tells the process that collected what happens, in place of those that report to a person."""

    def __init__(self, config: pytest.Config, pipe: Connection) -> None:
        self._config, self._pipe = config, pipe

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._pipe.send(("begins", nodeid, location))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._pipe.send(("says", self._config.hook.pytest_report_to_serializable(config=self._config, report=report)))

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._pipe.send(("ends", nodeid, location))


def _work(session: pytest.Session, files: list[list[pytest.Item]], next_file: int, pipe: Connection, scratch: Any) -> None:
    """Run files until there are none, and end this process."""
    code = 0
    try:
        config = session.config
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()  # its files are those of all forks
        capture.start_global_capturing()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(_Teller(config, pipe))
        scratch.mkdir(mode=0o700)
        config._tmp_path_factory._basetemp = scratch  # type: ignore[attr-defined]
        items = _handed_out(files, next_file)
        item = next(items, None)
        while item is not None and not session.shouldfail:
            following = next(items, None)  # before it runs: fixtures that the following does not need end with it
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            item = following
        session._setupstate.teardown_exact(None)
    except KeyboardInterrupt:
        code = 2
        session._setupstate.teardown_exact(None)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        code = 3
    pipe.close()
    atexit._run_exitfuncs()
    os._exit(code)


def _handed_out(files: list[list[pytest.Item]], next_file: int) -> Iterator[pytest.Item]:
    while number := os.read(next_file, _NUMBER.size):
        yield from files[_NUMBER.unpack(number)[0]]
