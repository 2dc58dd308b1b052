"""From nodes to shapes: which sorts of device the service may use at all, with which backend and image, and why not the others.

    nodes --selector, taints--> eligible nodes --one device each--> screens, in order --> Shape | Turned

A screen is a pure function that either lets a device pass or turns it down with a reason. Nodes that are equal for a plan make one shape,
so a thousand nodes cost a planner what their twenty shapes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gantline_runtime.config import Backend

from gantline_operator.accelerators import Device
from gantline_operator.conditions import Reason
from gantline_operator.facts import ClusterFacts, NodeFacts, untolerated
from gantline_operator.inventory import Taint
from gantline_operator.plan_types import Requirement, Turned
from gantline_operator.resource import InferenceServiceSpec

__all__ = ["MIN_BFLOAT16", "MIN_COMPUTE", "MIN_CUDA_BACKEND", "MIN_DRIVER", "Shape", "Slot", "eligible_nodes", "find_shapes", "readable"]

MIN_DRIVER = (580,)
"""Oldest NVIDIA driver for CUDA 13, which the runtime's torch is built for (requirements/runtime.txt; a test compares them)."""
MIN_COMPUTE = (7, 5)
"""Oldest GPUs that torch's CUDA 13 wheels have code for."""
MIN_CUDA_BACKEND = (8, 0)
"""Oldest GPUs that our own kernels are compiled for."""
MIN_BFLOAT16 = (8, 0)

_DISTINGUISHING = (
    "nvidia.com/gpu.memory",
    "nvidia.com/gpu.replicas",
    "nvidia.com/cuda.driver-version.major",
    "nvidia.com/cuda.driver.major",
)
"""Labels that tell nodes apart whose GPUs have one product name, in the order in which they are tried."""


def readable(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.1f} MiB"


@dataclass(frozen=True)
class Slot:
    """What one node of a shape offers."""

    node: NodeFacts
    count: int
    free: int | None


@dataclass(frozen=True)
class Shape:
    """Interchangeable devices, and the nodes that have them."""

    device: Device
    backend: Backend
    engine_device: Literal["cuda", "auto"]
    image: str
    slots: tuple[Slot, ...]
    node_labels: tuple[Requirement, ...]

    @property
    def largest(self) -> int:
        """Most devices on one node."""
        return max(slot.count for slot in self.slots)

    def placeable(self, count: int) -> int | None:
        """Pods of `count` devices that could start now; None: unknown."""
        if any(slot.free is None for slot in self.slots):
            return None
        return sum((slot.free or 0) // count for slot in self.slots)


def eligible_nodes(spec: InferenceServiceSpec, cluster: ClusterFacts, resource: str = "") -> tuple[list[NodeFacts], list[Turned]]:
    """Nodes on which the service's pods may run, and why others may not, one row for each reason."""
    selector = dict(spec.accelerator.node_selector or {})
    nodes: list[NodeFacts] = []
    causes: dict[str, list[str]] = {}
    for node in cluster.nodes:
        taint = untolerated(node, spec.pod.tolerations, resource)
        if not node.matches((), selector):
            causes.setdefault("accelerator.nodeSelector does not match their labels", []).append(node.name)
        elif taint is not None:
            causes.setdefault(f"their taint {_shown(taint)} is not tolerated by pod.tolerations", []).append(node.name)
        else:
            nodes.append(node)
    return nodes, [Turned(_names(names), Reason.NO_MATCHING_NODE, cause) for cause, names in causes.items()]


def _shown(taint: Taint) -> str:
    return f"{taint.key}={taint.value}:{taint.effect}" if taint.value else f"{taint.key}:{taint.effect}"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more nodes"


def find_shapes(spec: InferenceServiceSpec, cluster: ClusterFacts, images: Mapping[str, str]) -> tuple[list[Shape], list[Turned]]:
    """The shapes that pass every screen, and the devices that don't, each with its first reason. Found once for each wish."""
    wish = spec.accelerator
    selector = tuple(sorted((wish.node_selector or {}).items()))
    asked = (wish.resource, wish.products, wish.min_memory, wish.allow_shared, selector, spec.pod.tolerations, spec.engine.backend)
    key = ("shapes", *asked, tuple(sorted(images.items())))
    if key not in cluster.derived:
        cluster.derived[key] = _find_shapes(spec, cluster, images)
    shapes, turned = cluster.derived[key]
    return [*shapes], [*turned]


def _find_shapes(spec: InferenceServiceSpec, cluster: ClusterFacts, images: Mapping[str, str]) -> tuple[list[Shape], list[Turned]]:
    by_device, barred = _devices(spec, cluster)
    passed: dict[tuple[Device, Backend, str], list[Slot]] = {}
    turned: list[Turned] = []
    for device, slots in by_device.items():
        reason = next((found for screen in _SCREENS if (found := screen(device, spec)) is not None), None)
        backend, image, reason = _choose_backend(device, spec, images) if reason is None else ("auto", "", reason)
        if reason is not None:
            turned.append(replace(reason, option=device.title))
            continue
        # Drivers that are new enough are all alike: a node with a newer one is no other shape.
        passed.setdefault((replace(device, driver=()), backend, image), []).extend(slots)
    shapes = [
        Shape(device, backend, "auto" if image == "ascend" else "cuda", image, tuple(slots), _tell_apart(device, slots, by_device))
        for (device, backend, image), slots in passed.items()
    ]
    return sorted(shapes, key=lambda shape: shape.device), sorted(turned, key=lambda t: t.option) + barred


def _devices(spec: InferenceServiceSpec, cluster: ClusterFacts) -> tuple[dict[Device, list[Slot]], list[Turned]]:
    """Slots by device, of nodes where pods for that device may run; and those that selector or taints bar."""
    selector = dict(spec.accelerator.node_selector or {})
    found: dict[Device, list[Slot]] = {}
    barred: dict[tuple[str, str], None] = {}
    for node in cluster.nodes:
        if not node.offers:
            continue
        matches = not selector or node.matches((), selector)
        for offer in node.offers:
            taint = untolerated(node, spec.pod.tolerations, offer.device.resource) if matches else None
            if not matches:
                barred[(offer.device.title, "accelerator.nodeSelector matches none of its nodes' labels")] = None
            elif taint is not None:
                barred[(offer.device.title, f"the taint {_shown(taint)} of its nodes is not tolerated by pod.tolerations")] = None
            else:
                found.setdefault(offer.device, []).append(Slot(node, offer.count, offer.free))
    titles = {device.title for device in found}
    rows = [Turned(title, Reason.NO_MATCHING_GPU, message) for title, message in barred if title not in titles]
    return found, rows


def _tell_apart(device: Device, slots: Sequence[Slot], by_device: Mapping[Device, Sequence[Slot]]) -> tuple[Requirement, ...]:
    """The device's labels, and as many more as it takes to keep pods off nodes with the same product but another shape."""
    own = [slot.node for slot in slots]
    others = [
        slot.node
        for theirs, slots in by_device.items()
        # One node speaks for all of a device: its labels were read from theirs.
        if theirs.resource == device.resource and replace(theirs, driver=()) != device and slots[0].node.matches(device.labels)
        for slot in slots
    ]
    others += _old_drivers(device, own, by_device)
    labels = list(device.labels)
    for key in _DISTINGUISHING:
        if not others:
            break
        values = {_label(node, key) for node in own}
        if "" in values or all(_label(node, key) in values for node in others):
            continue
        labels.append((key, tuple(sorted(values))))
        others = [node for node in others if _label(node, key) in values]
    return tuple(Requirement(key, values) for key, values in labels)


def _old_drivers(device: Device, own: Sequence[NodeFacts], by_device: Mapping[Device, Sequence[Slot]]) -> list[NodeFacts]:
    """Nodes with the very same device, whose driver keeps them out."""
    names = {node.name for node in own}
    same = [slots for theirs, slots in by_device.items() if replace(theirs, driver=()) == device]
    return [slot.node for slots in same for slot in slots if slot.node.name not in names]


def _label(node: NodeFacts, key: str) -> str:
    return next((value for name, value in node.labels if name == key), "")


# -- screens -------------------------------------------------------------------------------------------------------------------------

Screen = Callable[[Device, InferenceServiceSpec], "Turned | None"]


def _turn(reason: Reason, message: str) -> Turned:
    return Turned("", reason, message)


def _is_wanted_resource(device: Device, spec: InferenceServiceSpec) -> Turned | None:
    wanted = spec.accelerator.resource
    if wanted in ("auto", device.resource):
        return None
    return _turn(Reason.NO_MATCHING_GPU, f"it is {device.resource}, and accelerator.resource is {wanted}")


def _is_wanted_product(device: Device, spec: InferenceServiceSpec) -> Turned | None:
    products = spec.accelerator.products
    if products is None or device.product in products:
        return None
    return _turn(Reason.NO_MATCHING_GPU, f"accelerator.products does not name {device.title}")


def _is_known(device: Device, spec: InferenceServiceSpec) -> Turned | None:
    if device.memory_bytes is not None and (device.vendor != "nvidia" or device.compute):
        return None
    return _turn(Reason.GPU_LABELS_MISSING, f"no label, table or inventory says what memory and generation {device.resource} has there")


def _is_large_enough(device: Device, spec: InferenceServiceSpec) -> Turned | None:
    least = spec.accelerator.min_memory
    if least is None or (device.memory_bytes or 0) >= least:
        return None
    message = f"it has {readable(device.memory_bytes or 0)}, and accelerator.minMemory asks for {readable(least)}"
    return _turn(Reason.NO_MATCHING_GPU, message)


def _is_not_shared(device: Device, spec: InferenceServiceSpec) -> Turned | None:
    if device.replicas == 1 or spec.accelerator.allow_shared:
        return None
    return _turn(Reason.NO_MATCHING_GPU, f"{device.replicas} pods share one by time-slicing, and accelerator.allowShared is false")


_SCREENS: tuple[Screen, ...] = (_is_wanted_resource, _is_wanted_product, _is_known, _is_large_enough, _is_not_shared)


def _choose_backend(device: Device, spec: InferenceServiceSpec, images: Mapping[str, str]) -> tuple[Backend, str, Turned | None]:
    """(backend, image's key, None), or a reason why the device cannot be used. The table of docs/architecture.md."""
    asked = spec.engine.backend
    if device.vendor == "nvidia":
        backend, image, wrong = _choose_nvidia(device, asked)
    elif device.vendor == "amd":
        backend, image = "triton" if asked == "auto" else asked, "rocm"
        wrong = "the cuda backend needs an NVIDIA GPU" if asked == "cuda" else ""
    else:
        backend, image = "torch", "ascend"
        wrong = "" if asked in ("auto", "torch") else f"the {asked} backend does not run on Ascend"
    reason = _turn(Reason.UNSUPPORTED_GPU, wrong) if wrong else None
    if reason is None and device.vendor == "nvidia" and device.driver and device.driver < MIN_DRIVER:
        said, least = ".".join(map(str, device.driver)), ".".join(map(str, MIN_DRIVER))
        reason = _turn(Reason.DRIVER_TOO_OLD, f"its driver is {said}, and the runtime's CUDA needs {least} or newer")
    if reason is None and not images.get(image):
        reason = _turn(Reason.NO_RUNTIME_IMAGE, f"no {image} image of the runtime is configured in the operator")
    return backend, image, reason  # type: ignore[return-value]


def _choose_nvidia(device: Device, asked: str) -> tuple[str, str, str]:
    """(backend, image, why not)."""
    capability = ".".join(map(str, device.compute))
    if device.compute < MIN_COMPUTE:
        return "", "", f"compute capability {capability} is older than 7.5, for which nothing is compiled"
    if device.compute < MIN_CUDA_BACKEND:
        wrong = "" if asked in ("auto", "torch") else f"the {asked} backend needs compute capability 8.0, and it has {capability}"
        return "torch", "cuda", wrong
    return "cuda" if asked == "auto" else asked, "cuda", ""
