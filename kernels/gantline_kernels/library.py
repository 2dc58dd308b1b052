"""The compiled CUDA kernels, bound once: plain C functions over raw pointers, so a new torch needs no new build.

The library is looked for at $GANTLINE_KERNELS_LIBRARY, beside this file (images), and in the cache (`python -m gantline_kernels.build`).
Without it the Triton kernels serve alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

from gantline_kernels import build

__all__ = ["VARIABLE", "call", "find", "load"]

VARIABLE = "GANTLINE_KERNELS_LIBRARY"
_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float
_WRONG_DEVICE = 400
"""cudaErrorInvalidResourceHandle: a stream of another device."""
_SIGNATURES = {
    "gantline_prefill_hopper": [
        _INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT,
        _LONG, _INT, _INT, _INT, _INT, _INT, _LONG, _INT, _INT, _INT, _INT, _FLOAT, _INT, _INT, _POINTER,
    ],
    "gantline_decode_hopper": [
        _INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG,
        _INT, _INT, _INT, _INT, _INT, _INT, _INT, _INT, _INT, _INT, _INT, _FLOAT, _FLOAT, _INT, _POINTER,
    ],
    "gantline_linear_few_rows": [
        _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT, _INT, _INT, _POINTER,
    ],
    "gantline_linear_batch_hopper": [
        _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT,
        _INT, _INT, _POINTER, _POINTER, _INT, _POINTER,
    ],
    "gantline_gated_linear_hopper": [
        _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT, _INT, _POINTER,
    ],
    "gantline_split_linear_hopper": [
        _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT, _INT, _POINTER, _POINTER, _POINTER,
    ],
    "gantline_prefer_shared_memory": [_POINTER],
    "gantline_sample_hopper": [
        _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER,
    ],
    "gantline_sample_long": [
        _INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _POINTER,
    ],
    "gantline_sample_long_scratch": [_INT, _INT],
}  # fmt: skip


log = logging.getLogger(__name__)


def find() -> Path | None:
    """The library's file, or None if there is none: where the environment names one, that one or none."""
    given = os.environ.get(VARIABLE)
    candidates = [Path(given)] if given else [Path(__file__).parent / "libgantline_kernels.so", build.library_path()]
    return next((path for path in candidates if path.is_file()), None)


@cache
def load() -> ctypes.CDLL | None:
    """The library with its functions' types, or None. Raises OSError for a file that is no such library, or one of other sources."""
    path = find()
    if path is None:
        if os.environ.get(VARIABLE):
            log.warning("there are no CUDA kernels at %s, named by %s; Triton's serve alone", os.environ[VARIABLE], VARIABLE)
        return None
    library = ctypes.CDLL(str(path))
    if build.stamp_of(library) != build.sources_hash():
        raise OSError(f"{path} was built from other sources; build it again: python -m gantline_kernels.build --output {path}")
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _INT
    return library


def call(name: str, *arguments: object) -> None:
    """Raises RuntimeError if the launch is refused, with CUDA's error number; OSError if there is no library.

    The current device must be that of the stream and of what the addresses point to.
    """
    library = load()
    if library is None:
        raise OSError("the CUDA kernels are not built: run python -m gantline_kernels.build")
    code = getattr(library, name)(*arguments)
    if code:
        hint = "; the tensors' GPU must be the current device (torch.cuda.set_device)" if code == _WRONG_DEVICE else ""
        raise RuntimeError(f"{name} failed to launch: CUDA error {code}{hint}")
