"""GPUs by the labels that managed clouds put on nodes, for clusters without GPU Feature Discovery.

Memory is what the driver reports of such a GPU (the vendor's figure less ECC and firmware), in MiB. A cloud's label that the table
lacks explains nothing: better no plan than one for the wrong memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CloudGpu", "from_cloud"]

_GPUS: Mapping[str, tuple[int, tuple[int, int]]] = {
    "tesla-k80": (11441, (3, 7)),
    "tesla-m60": (7618, (5, 2)),
    "tesla-p4": (7611, (6, 1)),
    "tesla-p100": (16276, (6, 0)),
    "tesla-v100": (16160, (7, 0)),
    "tesla-t4": (15360, (7, 5)),
    "a100-40gb": (40536, (8, 0)),
    "a100-80gb": (81251, (8, 0)),
    "a10g": (23028, (8, 6)),
    "l4": (23034, (8, 9)),
    "l40s": (46068, (8, 9)),
    "h100-80gb": (81559, (9, 0)),
    "h100-nvl": (95830, (9, 0)),
    "h200-141gb": (143771, (9, 0)),
    "b200": (183359, (10, 0)),
}
"""Memory in MiB and compute capability."""

_GKE = "cloud.google.com/gke-accelerator"
_GKE_NAMES = {"tesla-a100": "a100-40gb", "h100-mega-80gb": "h100-80gb"}
_KARPENTER = "karpenter.k8s.aws/instance-gpu-name"
_KARPENTER_NAMES = {
    "k80": "tesla-k80", "m60": "tesla-m60", "v100": "tesla-v100", "t4": "tesla-t4", "a10g": "a10g", "l4": "l4", "l40s": "l40s",
    "a100": "a100-40gb", "h100": "h100-80gb", "h200": "h200-141gb", "b200": "b200",
}  # fmt: skip
_INSTANCE = "node.kubernetes.io/instance-type"
_INSTANCE_TYPES = (
    (r"p3\..*", "tesla-v100"),
    (r"g4dn\..*", "tesla-t4"),
    (r"g5\..*", "a10g"),
    (r"g6\..*", "l4"),
    (r"g6e\..*", "l40s"),
    (r"p4d\..*", "a100-40gb"),
    (r"p4de\..*", "a100-80gb"),
    (r"p5\..*", "h100-80gb"),
    (r"p5en?\..*", "h200-141gb"),
    (r"p6-b200\..*", "b200"),
    (r"Standard_NC\d+as_T4_v3", "tesla-t4"),
    (r"Standard_ND96asr_v4", "a100-40gb"),
    (r"Standard_(NC\d+ads|ND\d+amsr)_A100_v4", "a100-80gb"),
    (r"Standard_NCC?\d+ad[a-z]*_H100_v5", "h100-nvl"),
    (r"Standard_ND\d+isr_H100_v5", "h100-80gb"),
    (r"Standard_ND\d+isr_H200_v5", "h200-141gb"),
)
"""Instance types of AWS and Azure; the first pattern that matches all of a name counts."""


@dataclass(frozen=True)
class CloudGpu:
    product: str
    memory_mib: int
    compute: tuple[int, int]
    labels: tuple[tuple[str, tuple[str, ...]], ...]
    replicas: int = 1
    sliced: bool = False


def from_cloud(labels: Mapping[str, str]) -> CloudGpu | None:
    """The GPU that a node's cloud labels name, or None where none does."""
    if _GKE in labels:
        return _from_gke(labels)
    if _KARPENTER in labels:
        return _from_karpenter(labels)
    instance = labels.get(_INSTANCE, "")
    for pattern, name in _INSTANCE_TYPES:
        if re.fullmatch(pattern, instance):
            memory, compute = _GPUS[name]
            return CloudGpu(name, memory, compute, ((_INSTANCE, (instance,)),))
    return None


def _from_gke(labels: Mapping[str, str]) -> CloudGpu | None:
    accelerator = labels[_GKE]
    name = accelerator.removeprefix("nvidia-")
    known = _GPUS.get(_GKE_NAMES.get(name, name))
    if known is None:
        return None
    memory, compute = known
    keys = [_GKE]
    partition = re.fullmatch(r"\d+g\.(\d+)gb.*", labels.get("cloud.google.com/gke-gpu-partition-size", ""))
    if partition:
        memory = min(memory, int(partition.group(1)) * 1024 * 95 // 100)
        keys.append("cloud.google.com/gke-gpu-partition-size")
    shared = labels.get("cloud.google.com/gke-gpu-sharing-strategy", "")
    clients = labels.get("cloud.google.com/gke-max-shared-clients-per-gpu", "")
    replicas = max(2, int(clients) if clients.isascii() and clients.isdigit() else 2) if shared else 1
    chosen = tuple((key, (labels[key],)) for key in keys)
    return CloudGpu(accelerator, memory, compute, chosen, replicas, partition is not None)


def _from_karpenter(labels: Mapping[str, str]) -> CloudGpu | None:
    name = labels[_KARPENTER]
    known = _GPUS.get(_KARPENTER_NAMES.get(name, ""))
    if known is None:
        return None
    memory, compute = known
    key = "karpenter.k8s.aws/instance-gpu-memory"
    said = labels.get(key, "")
    if said.isascii() and said.isdigit() and int(said) > memory:
        return CloudGpu(name, int(said) * 95 // 100, compute, ((_KARPENTER, (name,)), (key, (said,))))
    return CloudGpu(name, memory, compute, ((_KARPENTER, (name,)),))
