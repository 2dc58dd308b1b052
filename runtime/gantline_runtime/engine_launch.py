"""Starting the engine's process. It happens before the rest of the server is imported, and with as few modules as possible: what the engine
imports takes longest of all, and both can be done at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_settings import EngineSettings
from gantline_runtime.failures import OutOfMemoryKills
from gantline_runtime.logs import LogFormat

__all__ = ["EngineProcess", "launch_engine"]

_MAX_FOLDER_BYTES = 70


@dataclass(frozen=True)
class EngineProcess:
    """A process that loads its model once somebody has said hello at `endpoint`. `folder` holds its socket."""

    process: subprocess.Popen[bytes]
    endpoint: str
    folder: Path
    kills: OutOfMemoryKills

    def discard(self) -> None:
        """Kill it if it still runs, and remove its folder."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def launch_engine(
    model_dir: Path, config: EngineConfig, *, log_level: str = "info", log_format: LogFormat = "json", engine: str | None = None
) -> EngineProcess:
    """`engine` names another class than LLMEngine, as `module:class`. The process dies with the calling thread, however that ends."""
    folder = _socket_folder()
    settings = EngineSettings(
        endpoint=f"ipc://{folder}/engine",
        parent_pid=os.getpid(),
        model_dir=str(model_dir),
        engine_config=dataclasses.asdict(config),
        log_level=log_level,
        log_format=log_format,
    )
    if engine is not None:
        settings = dataclasses.replace(settings, engine=engine)
    kills = OutOfMemoryKills()
    command = [sys.executable, "-P", "-m", "gantline_runtime.engine_process", json.dumps(dataclasses.asdict(settings))]
    # stdout is the API process's own: what a library prints there belongs into the log.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
    return EngineProcess(process, settings.endpoint, folder, kills)


def _socket_folder() -> Path:
    """A new folder that only this user can enter, with a path short enough: a Unix socket's has at most 107 bytes."""
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="gantline-", dir=usual if len(os.fsencode(usual)) <= _MAX_FOLDER_BYTES else "/tmp"))
