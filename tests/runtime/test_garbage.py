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


_BY_HAND = """
import gc
from gantline_runtime import garbage
collected = []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]) if phase == "stop" else None)
garbage.collect_if_due()
assert gc.isenabled() and not collected, "the collector's own matter"
garbage.collect_by_hand()
kept = [[] for _ in range(30_000)]
assert not collected, collected
garbage.collect_if_due()
assert collected == [0], collected
garbage.collect_if_due()
assert collected == [0], "nothing is due"
for _ in range(200):
    kept += [[] for _ in range(1000)]
    garbage.collect_if_due()
assert {0, 1, 2} == set(collected) and collected.count(2) < 3, collected
"""


def test_where_garbage_is_collected_by_hand_none_is_collected_elsewhere_and_all_generations_have_their_turn() -> None:
    result = subprocess.run([sys.executable, "-c", _BY_HAND], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
