"""A part of the collected tests, for processes that run beside each other: pytest -p tests.kernels.sharing_out --share 2/8

The second of eight parts: every eighth test, since neighbours cost alike. Not forks (tests/forked.py): these use a GPU when imported.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="1/1", help="NUMBER/OF: which part of the tests to run, counted from 1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, of = (int(part) for part in config.getoption("--share").split("/"))
    if not 1 <= number <= of:
        raise pytest.UsageError(f"--share {number}/{of} is none of {of} parts")
    items[:] = items[number - 1 :: of]


def run_in_parts(files: list[str], parts: int, environment: Mapping[str, str], seconds: float) -> str:
    """Run `files` in so many processes -> what those that failed said; nothing if all passed. Raises TimeoutExpired past `seconds`."""
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-p", "tests.kernels.sharing_out"]
    running = [
        subprocess.Popen(
            [sys.executable, *options, f"--share={number}/{parts}", *files],
            cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(1, parts + 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return "\n".join(text[-6000:] for process, text in zip(running, said, strict=True) if process.returncode)
