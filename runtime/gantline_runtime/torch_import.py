"""Importing torch for an engine that is waited for: without what only tracing asks for, a fifth of the processor time.

At its end torch's import loads `torch._meta_registrations`, and with it a second implementation of most operators in Python
(`torch._decomp`, `torch._prims`, `torch._refs`): how tensors without values ("meta" and fake ones) go through them. Tensors with values
never ask. `complete_torch` loads it after all, for who traces.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["complete_torch", "without_tracing"]

_MODULE = "torch._meta_registrations"


@contextmanager
def without_tracing() -> Iterator[None]:
    """If torch is imported inside the block, and was not before, it comes without the implementations for tensors without values."""
    if "torch" in sys.modules:
        yield
        return
    placeholder = sys.modules[_MODULE] = ModuleType(_MODULE)
    try:
        yield
    finally:
        sys.modules.pop(_MODULE)
        torch, _, name = _MODULE.partition(".")
        if vars(sys.modules.get(torch, placeholder)).get(name) is placeholder:
            delattr(sys.modules[torch], name)


def complete_torch() -> None:
    """Load what was left out, if it is not there yet: before anything runs on torch's meta device or with fake tensors, and before torch's
    compiler is imported, as transformers does."""
    importlib.import_module(_MODULE)
