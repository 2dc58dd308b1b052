"""Python's garbage collector, and streams that would stand still for it.

A full collection looks at every object that lives: 165,000 are there once an engine is imported, which takes 80 ms, and comes back as
requests come and go. What exists when a process begins to serve stays until its end, so it is taken out of the collector's sight; and
modules stay too, so nothing is looked for while they are imported, which would take a tenth of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["held_back", "importing", "settle"]


def settle() -> None:
    """Collect what loading has left, and let no later collection look at the rest."""
    gc.collect()
    gc.freeze()


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
