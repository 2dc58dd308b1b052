"""What a device leaves us of its memory, and what of it is ours."""

from __future__ import annotations

import torch

from gantline_runtime.memory import available_host_bytes

__all__ = ["allocated_bytes", "context_bytes", "free_bytes"]


def free_bytes(device: torch.device, *, shared_by: int = 1) -> int:
    """Bytes that one rank may still allocate on `device`; on a CPU, `shared_by` ranks share what the host has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return available_host_bytes() // shared_by


def allocated_bytes(device: torch.device) -> int:
    """Bytes of this process's tensors on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def context_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are neither free nor in this process's pools of memory; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
