"""GPUs that a cluster offers by Dynamic Resource Allocation (`resource.k8s.io/v1`) instead of as extended resources of its nodes.

    ResourceSlice  --read_slice-->  Slice  --+
    DeviceClass    --read_class-->  DeviceClass +--> DynamicFacts: offers of nodes, and what claims of others hold
    ResourceClaim  --read_claim-->  Claim  --+

Pods still ask for a resource by name: the scheduler makes the claim for `deviceclass.resource.kubernetes.io/CLASS` (by default since
Kubernetes 1.36), or for the name that the class itself gives (`extendedResourceName`). So nothing of a pod is rendered otherwise, and what
our pods hold is counted as ever; claims are counted where somebody wrote them. NVIDIA's driver is read: its classes `gpu.nvidia.com` and
`mig.nvidia.com`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gantline_operator.accelerators import DEVICE_CLASS_PREFIX, Device, numbers
from gantline_operator.facts import NodeFacts, Offer, PodUse
from gantline_operator.quantities import parse_quantity

__all__ = ["ANY_CLASS_SINCE", "Claim", "DeviceClass", "DynamicDevice", "DynamicFacts", "Slice", "read_claim", "read_class", "read_slice"]

ANY_CLASS_SINCE = (1, 36)
"""The first Kubernetes whose scheduler makes claims for `deviceclass.resource.kubernetes.io/CLASS` unless it is told not to."""

_DRIVER = "gpu.nvidia.com"
_CLASSES = {"gpu": "gpu.nvidia.com", "mig": "mig.nvidia.com"}
"""By the attribute `type` of a device."""
_SCHEDULERS_OWN = "resource.kubernetes.io/extended-resource-claim"
_PRODUCT_LABEL, _HOST_LABEL = "nvidia.com/gpu.product", "kubernetes.io/hostname"


@dataclass(frozen=True)
class DynamicDevice:
    name: str
    kind: str
    """gpu or mig."""
    product: str
    memory_bytes: int | None
    compute: tuple[int, ...]
    driver: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """Devices of one node; those that a taint keeps from being allocated, and parts of devices that are offered whole, are left out."""

    node: str
    pool: str
    generation: int
    devices: tuple[DynamicDevice, ...]


@dataclass(frozen=True)
class DeviceClass:
    name: str
    extended_resource: str = ""
    """The resource's name that the class gives, if any. An API server whose scheduler makes no claims for resources drops it."""


@dataclass(frozen=True)
class Claim:
    """Devices (pool, name) that somebody's own ResourceClaim holds."""

    uid: str
    devices: tuple[tuple[str, str], ...]


def read_slice(item: Mapping[str, Any]) -> Slice | None:
    """None where it is another driver's, or its devices are not of one node."""
    spec = _map(item.get("spec"))
    pool = _map(spec.get("pool"))
    if spec.get("driver") != _DRIVER or not spec.get("nodeName"):
        return None
    devices = tuple(device for entry in _list(spec.get("devices")) if (device := _read_device(_map(entry))) is not None)
    generation = pool.get("generation")
    return Slice(str(spec["nodeName"]), str(pool.get("name", "")), generation if isinstance(generation, int) else 0, devices)


def read_class(item: Mapping[str, Any]) -> DeviceClass | None:
    name = str(_map(item.get("metadata")).get("name", ""))
    if name not in _CLASSES.values():
        return None
    return DeviceClass(name, str(_map(item.get("spec")).get("extendedResourceName") or ""))


def read_claim(item: Mapping[str, Any]) -> Claim | None:
    """None where nothing is allocated yet, or where the scheduler made it for a pod's resource, which counts itself."""
    metadata = _map(item.get("metadata"))
    results = _list(_map(_map(_map(item.get("status")).get("allocation")).get("devices")).get("results"))
    if _SCHEDULERS_OWN in _map(metadata.get("annotations")):
        return None
    held = tuple((str(r.get("pool", "")), str(r.get("device", ""))) for r in map(_map, results) if r.get("driver") == _DRIVER)
    return Claim(str(metadata.get("uid", "")), held) if held else None


def _read_device(entry: Mapping[str, Any]) -> DynamicDevice | None:
    attributes = {str(key).rpartition("/")[2]: _map(value) for key, value in _map(entry.get("attributes")).items()}
    kind = str(attributes.get("type", {}).get("string", ""))
    tainted = any(_map(taint).get("effect") in ("NoSchedule", "NoExecute") for taint in _list(entry.get("taints")))
    if kind not in _CLASSES or tainted or (kind == "mig" and entry.get("consumesCounters")):
        return None
    capacity = _map(_map(entry.get("capacity")).get("memory"))
    return DynamicDevice(
        name=str(entry.get("name", "")),
        kind=kind,
        # As labels write it, and spec.accelerator.products.
        product=str(attributes.get("productName", {}).get("string", "")).replace(" ", "-"),
        memory_bytes=_bytes(capacity.get("value")),
        compute=numbers(str(attributes.get("cudaComputeCapability", {}).get("version", "")))[:2],
        driver=numbers(str(attributes.get("driverVersion", {}).get("version", ""))),
    )


def _bytes(text: object) -> int | None:
    try:
        return int(parse_quantity(str(text)))
    except ValueError:
        return None


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


class DynamicFacts:
    """What slices, classes and claims say together. `any_class`: a class that gives no name can be asked for by its own."""

    def __init__(
        self, slices: Iterable[Slice] = (), classes: Iterable[DeviceClass] = (), claims: Iterable[Claim] = (), *, any_class: bool = True
    ) -> None:
        resources = {item.name: item.extended_resource or (f"{DEVICE_CLASS_PREFIX}{item.name}" if any_class else "") for item in classes}
        self._by_node: defaultdict[str, list[tuple[str, DynamicDevice]]] = defaultdict(list)
        self._place: dict[tuple[str, str], tuple[str, str]] = {}
        for item in _newest(slices):
            for device in item.devices:
                resource = resources.get(_CLASSES[device.kind])
                if resource:
                    self._by_node[item.node].append((resource, device))
                    self._place[item.pool, device.name] = (item.node, resource)
        self._products: defaultdict[str, set[str]] = defaultdict(set)
        for devices in self._by_node.values():
            for resource, device in devices:
                self._products[resource].add(device.product)
        self.uses = [use for claim in claims for use in self._use(claim)]
        """What claims that somebody wrote hold, as a pod would."""

    def add_to(self, node: NodeFacts) -> NodeFacts:
        """The node with its dynamic devices, unless it offers NVIDIA's as extended resources already: they would be the same ones."""
        found = self._by_node.get(node.name)
        if not found or any(offer.device.vendor == "nvidia" for offer in node.offers):
            return node
        counted = Counter(self._device(resource, device, node) for resource, device in found)
        return replace(node, offers=(*node.offers, *(Offer(device, count) for device, count in sorted(counted.items()))))

    def _device(self, resource: str, device: DynamicDevice, node: NodeFacts) -> Device:
        return Device(
            resource=resource,
            vendor="nvidia",
            product=device.product,
            memory_bytes=device.memory_bytes,
            compute=device.compute,
            driver=device.driver,
            sliced=device.kind == "mig",
            labels=self._labels(resource, node),
        )

    def _labels(self, resource: str, node: NodeFacts) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """By which a pod finds this product. Where all devices of the resource are alike, asking for it is enough."""
        if len(self._products[resource]) < 2:
            return ()
        labels = dict(node.labels)
        key = next((key for key in (_PRODUCT_LABEL, _HOST_LABEL) if labels.get(key)), "")
        return ((key, (labels[key],)),) if key else ()

    def _use(self, claim: Claim) -> Iterable[PodUse]:
        held = Counter(place for device in claim.devices if (place := self._place.get(device)) is not None)
        for (node, resource), count in sorted(held.items()):
            yield PodUse(claim.uid, node, ((resource, count),))


def _newest(slices: Iterable[Slice]) -> list[Slice]:
    """Of each pool its newest generation: the driver is replacing the others."""
    known = list(slices)
    latest: dict[tuple[str, str], int] = {}
    for item in known:
        key = (item.node, item.pool)
        latest[key] = max(item.generation, latest.get(key, 0))
    return [item for item in known if item.generation == latest[item.node, item.pool]]
