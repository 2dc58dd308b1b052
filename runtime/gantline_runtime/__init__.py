"""The data plane: engine, models, OpenAI server and the `gantline` command line.

`pipeline` and `GenerationConfig` are for use from Python (`offline.py`). They are imported when asked for: torch takes seconds, and the
operator, which reads this package's settings, has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gantline_runtime.config import EngineConfig
    from gantline_runtime.generation_config import GenerationConfig
    from gantline_runtime.offline import pipeline

__all__ = ["EngineConfig", "GenerationConfig", "pipeline"]

_MODULES = {"EngineConfig": "config", "GenerationConfig": "generation_config", "pipeline": "offline"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
