"""What an engine process is told when it is launched. Imports next to nothing: the launch comes first in a server's life."""

from __future__ import annotations

from dataclasses import dataclass

from gantline_runtime.logs import LogFormat

__all__ = ["EngineSettings"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The one argument of the process's command line, as JSON."""

    endpoint: str
    """zmq address to bind, `ipc://...` in a folder that only this user can enter."""
    parent_pid: int
    model_dir: str
    engine_config: dict[str, object]
    engine: str = "gantline_runtime.engine:LLMEngine"
    """`module:class` with the interface of `LLMEngine`."""
    log_level: str = "info"
    log_format: LogFormat = "json"
