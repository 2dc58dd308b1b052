"""The node's control groups: one named group in each hierarchy, which becomes the root that the node sees, and which goes with the run.

Both layouts are handled: version 2 (one tree), and version 1 (a tree for each controller, possibly with an empty version 2 tree beside
them).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from gantline_devcluster.node import linux

ROOT = Path("/sys/fs/cgroup")
LEAF = "components"
EMPTY_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Hierarchy:
    """One mounted control group tree; `options` are what it was mounted with (version 1: its controllers)."""

    point: Path
    kind: str
    options: str


def hierarchies(mountinfo: str | None = None) -> list[Hierarchy]:
    """The control group trees of this machine, from /proc/self/mountinfo."""
    found = []
    for line in (mountinfo if mountinfo is not None else Path("/proc/self/mountinfo").read_text()).splitlines():
        before, _, after = line.partition(" - ")
        kind, _, super_options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            controllers = ",".join(o for o in super_options.split(",") if o not in ("rw", "ro", "nsdelegate", "memory_recursiveprot"))
            found.append(Hierarchy(Path(before.split()[4]), kind, controllers if kind == "cgroup" else ""))
    return found


def enter(name: str) -> None:
    """Put this process into the group `name` of every tree, made if need be. Raises OSError."""
    for tree in hierarchies():
        if tree.point == ROOT and tree.kind == "cgroup2":
            delegate_controllers(ROOT)  # an init system hands down only what its own units need, often neither cpu nor cpuset
        group = tree.point / name
        group.mkdir(exist_ok=True)
        if tree.kind == "cgroup" and "cpuset" in tree.options.split(","):
            for setting in ("cpuset.cpus", "cpuset.mems"):  # version 1: empty until told, and no process may enter an empty set
                (group / setting).write_text((tree.point / setting).read_text())
        (group / "cgroup.procs").write_text("0")


def mount_as_root() -> None:
    """After unsharing the control group namespace: mount every tree anew, so that this process's group is the root of what can be seen."""
    trees = hierarchies()
    linux.mount("sysfs", "/sys", "sysfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    unified = [tree for tree in trees if tree.point == ROOT and tree.kind == "cgroup2"]
    if unified:
        linux.mount("cgroup2", ROOT, "cgroup2", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        delegate_controllers(ROOT)
        return
    linux.mount("tmpfs", ROOT, "tmpfs", options="mode=755,size=1m")
    for tree in trees:
        tree.point.mkdir()
        linux.mount("cgroup", tree.point, tree.kind, linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, tree.options)


def enter_leaf(name: str) -> None:
    """Version 2: a group that hands its controllers down may hold no processes itself, so the node's own ones live in a leaf of it."""
    for tree in hierarchies():
        if tree.point == ROOT and tree.kind == "cgroup2":
            leaf = tree.point / name / LEAF
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text("0")


def delegate_controllers(root: Path) -> None:
    for controller in (root / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):  # a controller that the machine does not hand down is one that pods go without
            (root / "cgroup.subtree_control").write_text(f"+{controller}")


def processes(name: str) -> set[int]:
    """Every process in the group `name` or below it, in any tree."""
    found: set[int] = set()
    for tree in hierarchies():
        for file in (tree.point / name).rglob("cgroup.procs") if (tree.point / name).is_dir() else []:
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in file.read_text().split()}
    return found


def remove(name: str) -> list[str]:
    """Kill what is left in the group and remove it from every tree; returns the folders that could not be removed."""
    deadline = time.monotonic() + EMPTY_TIMEOUT_S
    while (left := processes(name) - {os.getpid()}) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    stubborn = []
    for tree in hierarchies():
        top = tree.point / name
        folders = [folder for folder, _, _ in os.walk(top, topdown=False)] if top.is_dir() else []
        for folder in folders:
            try:
                _remove_when_empty(Path(folder), deadline)
            except OSError:
                stubborn.append(folder)
    return stubborn


def _remove_when_empty(folder: Path, deadline: float) -> None:
    """A group stays busy for a moment after its last process died."""
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
