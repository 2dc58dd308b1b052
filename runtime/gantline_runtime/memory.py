"""What the machine, or the container, leaves us: memory and processors. Imports no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["available_cpus", "available_host_bytes", "resident_bytes"]

_NO_LIMIT = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


def resident_bytes(*, proc: Path = Path("/proc")) -> int:
    """Memory of the host that this process holds now, in bytes."""
    for line in (proc / "self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{proc}/self/status has no VmRSS")


def available_host_bytes(*, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The least of the host's available memory and what each cgroup above this process leaves, in bytes.

    Page cache counts as available: the kernel gives it up for allocations.
    """
    candidates = [_mem_available(proc / "meminfo")]
    for folder, limit_name, usage_name in _memory_groups(proc, cgroup):
        limit, usage = _read_number(folder / limit_name), _read_number(folder / usage_name)
        if limit is not None and usage is not None and limit < _NO_LIMIT:
            candidates.append(max(0, limit - usage + _reclaimable(folder / "memory.stat")))
    return min(candidates)


def _mem_available(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no MemAvailable")


def _memory_groups(proc: Path, cgroup: Path) -> list[tuple[Path, str, str]]:
    """(folder, name of its limit, name of its usage) of this process's memory cgroup and those above it; version 2, then version 1."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[tuple[Path, str, str]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups += [(folder, "memory.max", "memory.current") for folder in _chain(cgroup, path)]
        elif "memory" in controllers.split(","):
            groups += [(folder, "memory.limit_in_bytes", "memory.usage_in_bytes") for folder in _chain(cgroup / "memory", path)]
    return groups


def _chain(root: Path, path: str) -> list[Path]:
    """The group's folder and its parents up to `root`; in a container the path is the host's, and only the root is there."""
    folder = Path(os.path.normpath(root / path.lstrip("/")))
    chain = [folder, *folder.parents]
    inside = [f for f in chain if f.is_relative_to(root) and f.is_dir()]
    return inside or [root]


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(path: Path) -> int:
    """File pages that can be dropped, from memory.stat (both versions name them alike; version 1 has totals of the whole tree)."""
    try:
        values = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(values.get("total_inactive_file", values.get("inactive_file", 0))) + int(
        values.get("total_active_file", values.get("active_file", 0))
    )


def available_cpus(*, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may use at once: its affinity, and the time quota of each cgroup above it, rounded up."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _cpu_groups(proc, cgroup):
        count = min(count, _quota(folder))
    return max(1, math.ceil(count))


def _cpu_groups(proc: Path, cgroup: Path) -> list[Path]:
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            groups += _chain(cgroup, path)
        elif "cpu" in controllers.split(","):
            groups += _chain(cgroup / "cpu", path)
    return groups


def _quota(folder: Path) -> float:
    """Processors' worth of time that a cgroup allows; infinity for no limit. Version 2's cpu.max, else version 1's pair of files."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    limit, period_us = _read_number(folder / "cpu.cfs_quota_us"), _read_number(folder / "cpu.cfs_period_us")
    return limit / period_us if limit is not None and period_us and limit > 0 else math.inf
