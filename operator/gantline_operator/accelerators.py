"""Which accelerators a node offers, from its labels and allocatable resources: NVIDIA, AMD, Ascend, whole, sliced or shared.

Sources, best first: the vendor's own labels (GPU Feature Discovery, AMD's labeller), a table where the vendor names no memory (Ascend),
an administrator's inventory, the cloud's labels. A resource that no source explains is a `Device` without memory, and the planner
answers `GPULabelsMissing` with its name. Numbers are compared as numbers: "10.0" is more than "9.0".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from gantline_runtime.sizing import GIB

from gantline_operator.cloud_labels import CloudGpu, from_cloud
from gantline_operator.quantities import parse_quantity

__all__ = [
    "AMD", "ASCEND_PREFIX", "DEVICE_CLASS_PREFIX", "NVIDIA", "USUAL_TAINTS", "Device", "Labels", "numbers", "read_devices", "vendor_of",
]  # fmt: skip

Labels = Mapping[str, str]

NVIDIA, AMD, ASCEND_PREFIX = "nvidia.com/gpu", "amd.com/gpu", "huawei.com/Ascend"
USUAL_TAINTS = (NVIDIA, AMD)
"""Keys of taints that nodes with such devices carry by custom."""
DEVICE_CLASS_PREFIX = "deviceclass.resource.kubernetes.io/"
"""Before the name of a DeviceClass, a resource for which the scheduler makes a claim (`dynamic_devices.py`)."""
_MIB = 1 << 20
_MIG = re.compile(r"nvidia\.com/mig-(\d+g\.(\d+)gb(?:\.[a-z0-9.]+)?)")
_DEVICE_CLASSES = ("gpu.nvidia.com", "mig.nvidia.com")
_MIG_PRODUCT = re.compile(r"MIG-\d+g\.\d+gb")

_ASCEND_GIB = {"910b4": 32, "910b": 64, "910_93": 64, "910c": 64, "910a": 32, "910": 32, "310p": 24, "310": 8}
"""Memory of Ascend chips, whose labels don't say it; the longest prefix of the chip's name counts, and of variants the smallest."""


@dataclass(frozen=True, order=True)
class Device:
    """A sort of accelerator: two nodes whose devices are equal are interchangeable for a plan."""

    resource: str
    """What a pod asks for, `nvidia.com/gpu`."""
    vendor: str
    """nvidia, amd, ascend, or empty."""
    product: str
    memory_bytes: int | None
    """Of one device; of one share, where it is shared. None: no label says it."""
    compute: tuple[int, ...] = ()
    """NVIDIA's compute capability; empty: unknown, or another vendor."""
    driver: tuple[int, ...] = ()
    """NVIDIA's driver version; empty: unknown."""
    replicas: int = 1
    """Pods that share one device by time-slicing or MPS."""
    sliced: bool = False
    """A MIG slice: isolated, but without a fast link to any other."""
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Node labels (key, allowed values) by which a pod finds such a device."""

    @property
    def title(self) -> str:
        return self.product or self.resource


def numbers(text: str) -> tuple[int, ...]:
    """`550.54.15` as (550, 54, 15); stops at the first part that is no number."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isascii() or not part.isdigit() or len(part) > 9:
            break
        parts.append(int(part))
    return tuple(parts)


def vendor_of(resource: str) -> str:
    """The vendor of an extended resource, or an empty text where it is no accelerator that we know."""
    if resource == NVIDIA or _MIG.fullmatch(resource) or resource.removeprefix(DEVICE_CLASS_PREFIX) in _DEVICE_CLASSES:
        return "nvidia"
    if resource == AMD:
        return "amd"
    return "ascend" if resource.startswith(ASCEND_PREFIX) else ""


def read_devices(labels: Labels, allocatable: Mapping[str, str]) -> dict[Device, int]:
    """Devices of a node and how many of each are allocatable. Unknown ones are there, without memory."""
    found: dict[Device, int] = {}
    for resource, amount in sorted(allocatable.items()):
        count = _count(amount)
        if count and vendor_of(resource):
            found[_read(resource, labels)] = count
    return found


def _count(amount: object) -> int:
    try:
        return int(parse_quantity(str(amount)))
    except ValueError:
        return 0


def _read(resource: str, labels: Labels) -> Device:
    vendor = vendor_of(resource)
    if vendor == "amd":
        return _read_amd(labels)
    if vendor == "ascend":
        return _read_ascend(resource, labels)
    mig = _MIG.fullmatch(resource)
    if mig:
        return _read_mixed_mig(resource, mig.group(1), int(mig.group(2)), labels)
    if "nvidia.com/gpu.product" in labels and "nvidia.com/gpu.memory" in labels:
        return _read_nvidia(labels)
    gpu = from_cloud(labels)
    return Device(resource, "nvidia", "", None) if gpu is None else _from_cloud(gpu)


def _read_nvidia(labels: Labels) -> Device:
    product = labels["nvidia.com/gpu.product"]
    replicas = _replicas(labels, "nvidia.com/gpu")
    memory = _mebibytes(labels["nvidia.com/gpu.memory"])
    return Device(
        resource=NVIDIA,
        vendor="nvidia",
        product=product,
        memory_bytes=None if memory is None else memory // replicas,
        compute=_compute(labels),
        driver=_driver(labels),
        replicas=replicas,
        sliced=_MIG_PRODUCT.search(product) is not None,
        labels=(("nvidia.com/gpu.product", (product,)),),
    )


def _read_mixed_mig(resource: str, profile: str, gib: int, labels: Labels) -> Device:
    """A MIG slice under the `mixed` strategy, where each profile is a resource of its own with labels of its own."""
    prefix = f"nvidia.com/mig-{profile}"
    memory = _mebibytes(labels.get(f"{prefix}.memory", ""))
    replicas = _replicas(labels, prefix)
    whole = memory if memory is not None else gib * GIB * 95 // 100  # a profile's name is rounded up
    product = labels.get(f"{prefix}.product") or f"{labels.get('nvidia.com/gpu.product', 'NVIDIA')}-MIG-{profile}"
    has_gpu = labels.get("nvidia.com/gpu.product")
    key = f"{prefix}.product" if f"{prefix}.product" in labels else "nvidia.com/gpu.product"
    return Device(
        resource=resource,
        vendor="nvidia",
        product=product,
        memory_bytes=whole // replicas,
        compute=_compute(labels),
        driver=_driver(labels),
        replicas=replicas,
        sliced=True,
        labels=((key, (labels[key],)),) if has_gpu or key in labels else (),
    )


def _replicas(labels: Labels, prefix: str) -> int:
    """Pods that share one device. The product's suffix counts too: where sharing is announced that way alone, two at least share."""
    number = numbers(labels.get(f"{prefix}.replicas", ""))
    shared = labels.get(f"{prefix}.product", "").endswith("-SHARED") or labels.get(f"{prefix}.sharing-strategy", "none") not in ("none", "")
    return max(number[0] if number else 1, 2 if shared else 1)


def _mebibytes(text: str) -> int | None:
    """Bytes of a label that holds MiB."""
    value = numbers(text)
    return value[0] * _MIB if value and value[0] > 0 else None


def _compute(labels: Labels) -> tuple[int, ...]:
    """From GPU Feature Discovery; both spellings that its releases have used."""
    for prefix in ("nvidia.com/gpu.compute", "nvidia.com/cuda.compute"):
        pair = numbers(f"{labels.get(f'{prefix}.major', '')}.{labels.get(f'{prefix}.minor', '0')}")
        if pair:
            return pair
    return ()


def _driver(labels: Labels) -> tuple[int, ...]:
    full = numbers(labels.get("nvidia.com/cuda.driver-version.full", ""))
    if full:
        return full
    for prefix, last in (("nvidia.com/cuda.driver-version", "revision"), ("nvidia.com/cuda.driver", "rev")):
        found = numbers(".".join(labels.get(f"{prefix}.{part}", "") for part in ("major", "minor", last)))
        if found:
            return found
    return ()


def _from_cloud(gpu: CloudGpu) -> Device:
    return Device(
        resource=NVIDIA,
        vendor="nvidia",
        product=gpu.product,
        memory_bytes=gpu.memory_mib * _MIB // gpu.replicas,
        compute=gpu.compute,
        replicas=gpu.replicas,
        sliced=gpu.sliced,
        labels=gpu.labels,
    )


def _read_amd(labels: Labels) -> Device:
    for prefix in ("amd.com/gpu", "beta.amd.com/gpu"):
        product, vram = labels.get(f"{prefix}.product-name", ""), labels.get(f"{prefix}.vram", "")
        match = re.fullmatch(r"([0-9]{1,6})(M|G|T)i?B?", vram)
        if match:
            # AMD's labeller writes G for GiB.
            memory = math.floor(Decimal(match.group(1)) * {"M": _MIB, "G": GIB, "T": GIB * 1024}[match.group(2)])
            keys = [(f"{prefix}.vram", (vram,)), *([(f"{prefix}.product-name", (product,))] if product else [])]
            return Device(AMD, "amd", product or f"AMD-{vram}", memory, labels=tuple(sorted(keys)))
    return Device(AMD, "amd", "", None)


def _read_ascend(resource: str, labels: Labels) -> Device:
    for key in ("node.kubernetes.io/npu.chip.name", "accelerator"):
        chip = labels.get(key, "")
        name = chip.lower().removeprefix("huawei-").removeprefix("ascend")
        prefix = max((p for p in _ASCEND_GIB if name.startswith(p)), key=len, default="")
        if prefix:
            return Device(resource, "ascend", chip, _ASCEND_GIB[prefix] * GIB, labels=((key, (chip,)),))
    return Device(resource, "ascend", "", None)
