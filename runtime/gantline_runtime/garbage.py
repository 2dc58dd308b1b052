"""Python's garbage collector, and streams that would stand still for it.

A full collection looks at every object that lives: 165,000 are there once an engine is imported, which takes 80 ms, and comes back as
requests come and go. What exists when a process begins to serve stays until its end, so it is taken out of the collector's sight; and
modules stay too, so nothing is looked for while they are imported, which would take a tenth of the time.
The engine's process looks at young objects, among them prompts of any length, while the device works, not while tokens wait to be sent.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collect_by_hand", "collect_if_due", "held_back", "importing", "settle"]


def settle() -> None:
    """Collect what loading has left, and let no later collection look at the rest."""
    gc.collect()
    gc.freeze()


def collect_by_hand() -> None:
    """From now on collect only where `collect_if_due` is called, instead of wherever an object happens to be one too many."""
    gc.disable()


def collect_if_due() -> None:
    """Collect what the automatic collector would by now, where it is switched off."""
    if gc.isenabled():
        return
    due = [count > threshold > 0 for count, threshold in zip(gc.get_count(), gc.get_threshold(), strict=True)]
    if due[0]:
        gc.collect(2 if due[1] and due[2] else 1 if due[1] else 0)


@contextmanager
def importing() -> Iterator[None]:
    """No collection while modules are imported, and no look at what they have made afterwards. Not where tensors live already."""
    with held_back():
        yield
        gc.freeze()


@contextmanager
def held_back() -> Iterator[None]:
    """No collection meanwhile: for what makes many objects at once while streams wait."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
