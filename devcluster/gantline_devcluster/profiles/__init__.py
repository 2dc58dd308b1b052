"""Simulated nodes from profile files: what `kubectl get node -o yaml` would show of servers that nobody has here.

A profile is a YAML file with `nodes`, a list of groups; each group has `name` (the nodes' prefix), `count`, `labels`, `capacity`, and,
where wanted, `allocatable` (what differs from the capacity), `taints` and `annotations`. `load` makes plain Node objects of it and needs
no cluster, so the planner's tables use the same files as the simulation.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from gantline_devcluster.binaries import KUBERNETES
from gantline_devcluster.errors import DevclusterError

__all__ = ["FAKE_NODE", "load", "names"]

FAKE_NODE = "kwok.x-k8s.io/node"  # the annotation (and taint) that marks a node as simulated; its value is "fake"
_FOLDER = Path(__file__).resolve().parent
_GROUP_FIELDS = {"name", "count", "labels", "capacity", "allocatable", "taints", "annotations"}
_MAX_NODES = 20_000
Node = dict[str, Any]


def names() -> list[str]:
    """The profiles that ship with this package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(profile: str | Path, count: int | None = None, *, tainted: bool = False) -> list[Node]:
    """The nodes of a shipped profile (by name) or of a profile file (by path): Ready, with allocatable, labels and taints.

    `count` replaces the count of each of the profile's groups. Nodes are named `<group>-<index>`, from 0; the same call gives the same
    nodes. `tainted` adds a NoSchedule taint `kwok.x-k8s.io/node=fake`, which keeps pods of a real node away. Raises DevclusterError for
    an unknown profile or a file that is none.
    """
    groups = _read(_find(profile))
    if count is not None and not 1 <= count <= _MAX_NODES:
        raise DevclusterError(f"{count} simulated nodes were asked for", f"Ask for 1 to {_MAX_NODES}")
    return [_node(group, index, tainted) for group in groups for index in range(count or int(group.get("count", 1)))]


def _find(profile: str | Path) -> Path:
    shipped = _FOLDER / f"{profile}.yaml"
    if re.fullmatch(r"[a-z0-9-]+", str(profile)) and shipped.exists():
        return shipped
    path = Path(profile)
    if not path.is_file():
        raise DevclusterError(f"there is no profile {profile!s}", f"Give the path of a profile file, or one of {', '.join(names())}")
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        groups = (yaml.safe_load(path.read_text()) or {}).get("nodes")
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise DevclusterError(
            f"{path} is not a profile: {str(error).splitlines()[0]}", "Compare it with the profiles of gantline_devcluster"
        ) from error
    if not isinstance(groups, list) or not groups:
        raise DevclusterError(f"{path} has no list `nodes`", "Compare it with the profiles of gantline_devcluster")
    for group in groups:
        unknown = set(group) - _GROUP_FIELDS if isinstance(group, dict) else {str(group)}
        if unknown or not {"name", "capacity"} <= set(group):
            said = f"unknown fields {sorted(unknown)}" if unknown else "a group without name or capacity"
            raise DevclusterError(f"{path} has {said}", f"A group has {', '.join(sorted(_GROUP_FIELDS))}; name and capacity are needed")
    return list(groups)


def _node(group: dict[str, Any], index: int, tainted: bool) -> Node:
    name = f"{group['name']}-{index}"
    capacity = {key: str(value) for key, value in group["capacity"].items()}
    labels = {"kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "kubernetes.io/hostname": name, "type": "kwok"}
    labels |= {key: str(value) for key, value in (group.get("labels") or {}).items()}
    annotations = {FAKE_NODE: "fake", "node.alpha.kubernetes.io/ttl": "0", **(group.get("annotations") or {})}
    taints = copy.deepcopy(group.get("taints") or [])
    if tainted:
        taints.append({"key": FAKE_NODE, "value": "fake", "effect": "NoSchedule"})
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {"taints": taints} if taints else {},
        "status": {
            "phase": "Running",
            "capacity": capacity,
            "allocatable": {**capacity, **{key: str(value) for key, value in (group.get("allocatable") or {}).items()}},
            "addresses": [{"type": "Hostname", "address": name}],
            "conditions": _conditions(),
            "nodeInfo": {
                "architecture": labels["kubernetes.io/arch"], "operatingSystem": "linux", "kubeletVersion": KUBERNETES.version,
                "kubeProxyVersion": "", "containerRuntimeVersion": "simulated://1", "kernelVersion": "simulated", "osImage": "simulated",
                "machineID": "", "systemUUID": "", "bootID": "",
            },
        },
    }  # fmt: skip


def _conditions() -> list[dict[str, str]]:
    def condition(kind: str, status: str, reason: str) -> dict[str, str]:
        return {"type": kind, "status": status, "reason": reason, "message": "simulated"}

    pressures = [condition(f"{what}Pressure", "False", f"KubeletHasSufficient{what}") for what in ("Memory", "Disk", "PID")]
    return [condition("Ready", "True", "KubeletReady"), *pressures]
