"""Says that a kernel is being compiled, so that nobody takes an engine that compiles for one that is stuck; and how many were.

Triton compiles a kernel when it first meets a new type or constant, in the middle of a step; several of them, on a slow machine, take
longer than any step may. While it does, the engine cannot speak, so it says beforehand how long it may be silent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["MOST_COMPILE_S", "announce_compilations", "expect_silence", "loaded_kernels"]

MOST_COMPILE_S = 300.0
"""One kernel that takes longer is stuck after all."""

_announce: Callable[[float], None] = lambda seconds: None


def announce_compilations(announce: Callable[[float], None]) -> None:
    """Have `announce(seconds)` called before each compilation, with how long it may take, and with 0 after it. Only if Triton is loaded."""
    global _announce
    _announce = announce
    if "triton" in sys.modules:
        from triton import knobs

        knobs.runtime.jit_cache_hook = _before
        knobs.runtime.jit_post_compile_hook = _after


def expect_silence(seconds: float) -> None:
    """The engine may say nothing for so long, and is not stuck. 0: it is back."""
    _announce(seconds)


def loaded_kernels() -> dict[str, int]:
    """Triton's kernels that this process has loaded, by where they came from: `image` (made beforehand), `cache` (an earlier process
    compiled them), `compiled`. Empty if Triton is not loaded."""
    module = sys.modules.get("gantline_kernels.prebuilt")
    return dict(vars(module.counts)) if module is not None else {}


def _before(**_: Any) -> None:
    """Triton's hook; what it returns says whether to skip the compilation."""
    expect_silence(MOST_COMPILE_S)


def _after(**_: Any) -> None:
    expect_silence(0.0)
