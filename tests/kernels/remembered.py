"""Runs of the kernels' checks in processes of their own, which are not done again while nothing that they depend on has changed.

Triton's interpreter and compiler take minutes and say the same of the same sources each time. A run that succeeded is kept, as Go's tests
are, by all that decides about it: its command, the variables that it is given, the sources of the kernels and of their checks (kernels
import no other part), and the versions of what is below. GANTLINE_FULL_MATRIX=1 does all of them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import gantline_kernels

from tests.kernels.compiled import compiled_folder

ROOT = Path(__file__).parents[2]
_BELOW = ("torch", "triton", "numpy", "pytest")


def run_check(*arguments: str, **variables: str) -> str:
    """What `python *arguments` printed with these environment variables, now or when it succeeded before. AssertionError if it fails."""
    kept = compiled_folder("answers") / _key(arguments, variables)
    if kept.exists() and os.environ.get("GANTLINE_FULL_MATRIX") != "1":
        return kept.read_text()
    environment = _without_settings() | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(compiled_folder("triton"))} | variables
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-4000:]
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    partial.write_text(result.stdout)
    partial.replace(kept)
    return result.stdout


def _key(arguments: tuple[str, ...], variables: dict[str, str]) -> str:
    what = json.dumps([arguments, sorted(variables.items()), _sources()])
    return hashlib.sha256(what.encode()).hexdigest()


@cache
def _sources() -> str:
    """A hash of the kernels, their checks, and the programs below them."""
    kernels = Path(gantline_kernels.__file__).parent
    versions = [f"{name} {version(name)}" for name in _BELOW]
    digest = hashlib.sha256(" ".join([platform.python_version(), platform.machine(), *versions]).encode())
    for folder in (kernels, Path(__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".c", ".json"):
                digest.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _without_settings() -> dict[str, str]:
    """The environment without what would change what a check does and is not part of its key; where the cache lies is none of that."""
    settings = ("TRITON", "GANTLINE", "PYTEST", "TORCH")
    return {name: value for name, value in os.environ.items() if name == "GANTLINE_CACHE" or not name.startswith(settings)}
