"""Where what tests compile for GPUs that are not there is kept between runs: minutes of work otherwise.

Each kernel lies there by its own key, of its source, what that calls, its constants and the compiler, so a change of one compiles one anew.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

import triton
from gantline_kernels.build import cache_folder

_KEPT_S = 14 * 24 * 3600.0


def compiled_folder(name: str) -> Path:
    """The folder of this name for this Triton, made if there is none. What was put beside or into it two weeks ago is removed."""
    folder = cache_folder() / "compiled-in-tests" / f"{name}-{triton.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in (*folder.parent.iterdir(), *folder.iterdir()):
        with suppress(FileNotFoundError):  # another worker was faster
            if entry != folder and entry.stat().st_mtime < time.time() - _KEPT_S:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return folder
