"""What is there when a process begins to serve is looked at by no later collection."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import gc
import gantline_runtime.engine
from gantline_runtime import garbage
before = len(gc.get_objects())
garbage.settle()
assert before > 100_000, before
assert gc.get_freeze_count() > 0.9 * before, gc.get_freeze_count()
assert len(gc.get_objects()) < 0.05 * before, len(gc.get_objects())
"""


def test_after_settling_a_full_collection_has_next_to_nothing_to_look_at() -> None:
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
