"""Opening the GPU while Python imports: the driver's start and its context take some tenths of a second, and need nothing of torch.

A device's primary context belongs to the process: torch finds it there and goes on with it. What fails here fails again where torch asks,
which says why.
"""

from __future__ import annotations

import ctypes
import os
import threading

__all__ = ["begin_opening", "open_gpu"]


def begin_opening(device: str, number: int = 0) -> threading.Thread | None:
    """Open GPU `number` in a thread of its own, unless `device` (as `EngineConfig.device`) is the CPU. Nobody needs to wait for it."""
    if device == "cpu":
        return None
    thread = threading.Thread(target=open_gpu, args=(number,), name="gantline-open-gpu", daemon=True)
    thread.start()
    return thread


def open_gpu(number: int = 0, library: str = "libcuda.so.1") -> bool:
    """Make the primary context of NVIDIA GPU `number` among those that this process may see; says whether there is one now."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # which torch asks for as well, but the driver reads it once
    try:
        driver = ctypes.CDLL(library)
    except OSError:  # no driver: a CPU, or another maker's GPU
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    # ctypes lets Python go on during these calls.
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), number) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )
