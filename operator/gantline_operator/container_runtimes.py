"""What a node's kubelet and container runtime can do, by the versions that the node reports (`status.nodeInfo`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["mounts_images"]

_FIRST_RUNTIMES = {"containerd": (2, 1), "cri-o": (1, 31)}
_KUBELET_BETA, _KUBELET_ON = (1, 33), (1, 35)
"""Since when image volumes can be turned on without an alpha gate, and since when they are on."""
_VERSION = re.compile(r"v?(\d{1,4})\.(\d{1,4})")


def mounts_images(node_info: Mapping[str, Any]) -> bool | None:
    """Whether pods of the node may have image volumes; None where its versions do not tell."""
    name, _, version = str(node_info.get("containerRuntimeVersion", "")).partition("://")
    runtime, kubelet, first = _parse(version), _parse(str(node_info.get("kubeletVersion", ""))), _FIRST_RUNTIMES.get(name)
    if runtime is None or kubelet is None or first is None:
        return None
    if runtime < first or kubelet < _KUBELET_BETA:
        return False
    return True if kubelet >= _KUBELET_ON else None


def _parse(text: str) -> tuple[int, int] | None:
    match = _VERSION.match(text)
    return (int(match[1]), int(match[2])) if match else None
