"""The cluster as the planner sees it: nodes, the accelerators they offer, and how many of those are free.

    Node objects --read_node--> NodeFacts --+
    Pod objects --reduce_pod--> PodUse -----+--> cluster_facts() --> ClusterFacts (immutable, hashable)
    our own plans not yet bound ------------+    free = allocatable - bound pods - planned but unbound pods + own pods being replaced

A pod counts until it is gone or has ended, also while it is deleted: its GPU is not free before. Where pods may not be read, `free` is
None and the scheduler decides.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from gantline_operator.accelerators import Device, read_devices, vendor_of
from gantline_operator.container_runtimes import mounts_images
from gantline_operator.inventory import Inventory, Pool, Taint
from gantline_operator.quantities import parse_quantity
from gantline_operator.resource import Toleration

__all__ = ["ClusterFacts", "NodeFacts", "Offer", "PodUse", "Reservation", "cluster_facts", "read_node", "reduce_pod", "untolerated"]

NodeLabels = tuple[tuple[str, tuple[str, ...]], ...]
_SERVICE_LABEL = "gantline.io/service"


@dataclass(frozen=True)
class Offer:
    """One sort of device of one node."""

    device: Device
    count: int
    """Allocatable."""
    free: int | None = None
    """None: unknown."""


@dataclass(frozen=True)
class NodeFacts:
    name: str
    labels: frozenset[tuple[str, str]] = frozenset()
    taints: tuple[Taint, ...] = ()
    available: bool = True
    """Ready and not cordoned; a shape that is not available is known, but has nothing free."""
    offers: tuple[Offer, ...] = ()
    cpu_millis: int = 0
    """Allocatable; 0: unknown."""
    memory_bytes: int = 0
    """Allocatable; 0: unknown."""
    live: bool = True
    """False: a pool of the inventory that stands at zero nodes."""
    mounts_images: bool | None = None
    """Whether its pods may have image volumes; None: unknown."""

    def matches(self, node_labels: Iterable[tuple[str, Sequence[str]]], selector: Mapping[str, str] | None = None) -> bool:
        """Whether the node has one of the values of each label, and all labels of `selector`."""
        wanted = all(any((key, value) in self.labels for value in values) for key, values in node_labels)
        return wanted and all(pair in self.labels for pair in (selector or {}).items())

    def less(self, used: Mapping[str, int]) -> NodeFacts:
        """The node with its free devices, when so many of each resource are used. Made once: every plan asks, and few nodes change."""
        key = tuple(sorted(used.items())) if used else ()
        if key not in self._known:
            offers = (replace(offer, free=max(0, offer.count - used.get(offer.device.resource, 0))) for offer in self.offers)
            none = (replace(offer, free=0) for offer in self.offers)
            self._known[key] = replace(self, offers=tuple(offers if self.available else none))
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[tuple[str, int], ...], NodeFacts]:
        return {}


@dataclass(frozen=True)
class PodUse:
    """All that is kept of a pod: which devices of which node it holds."""

    uid: str
    node: str
    requests: tuple[tuple[str, int], ...]
    service: str = ""
    """`namespace/name` of the InferenceService it belongs to, if any."""


@dataclass(frozen=True)
class Reservation:
    """Pods that were planned and have no node yet; their devices are as good as taken."""

    service: str
    resource: str
    count: int
    pods: int
    node_labels: NodeLabels = ()
    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[Toleration, ...] = ()


@dataclass(frozen=True)
class ClusterFacts:
    """Nodes that live and pools that could; equal facts give equal plans."""

    nodes: tuple[NodeFacts, ...] = ()
    nodes_known: bool = True
    """False where the operator may not read nodes."""

    @cached_property
    def derived(self) -> dict[Hashable, Any]:
        """What was made of these facts alone, by what was asked: many services ask the same of one cluster."""
        return {}

    @cached_property
    def digest(self) -> int:
        """For caches; equal facts have equal digests."""
        return hash(self)


def read_node(node: Mapping[str, Any], inventory: Inventory = Inventory()) -> NodeFacts:
    """Facts of a Node object; nothing in it is trusted to be there."""
    metadata, spec, status = _map(node.get("metadata")), _map(node.get("spec")), _map(node.get("status"))
    labels = {str(key): str(value) for key, value in _map(metadata.get("labels")).items()}
    allocatable = {str(key): str(value) for key, value in _map(status.get("allocatable")).items()}
    devices = read_devices(labels, allocatable)
    offers = tuple(Offer(_explain(device, labels, inventory), count) for device, count in devices.items())
    return NodeFacts(
        name=str(metadata.get("name", "")),
        labels=frozenset(labels.items()),
        taints=tuple(_taints(spec.get("taints"))),
        available=_ready(status) and spec.get("unschedulable") is not True,
        offers=offers,
        cpu_millis=_amount(allocatable.get("cpu"), 1000),
        memory_bytes=_amount(allocatable.get("memory"), 1),
        mounts_images=mounts_images(_map(status.get("nodeInfo"))),
    )


def _explain(device: Device, labels: Mapping[str, str], inventory: Inventory) -> Device:
    """The inventory's word on a device of a pool that it names.

    Labels are better witnesses of what is inside, but only the pool's own labels are on the nodes that an autoscaler would add.
    """
    pool = inventory.find(labels, device.resource)
    if pool is None or pool.device is None:
        return device
    return pool.device if device.memory_bytes is None else replace(device, labels=pool.device.labels)


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _ready(status: Mapping[str, Any]) -> bool:
    return any(_map(c).get("type") == "Ready" and _map(c).get("status") == "True" for c in _list(status.get("conditions")))


def _taints(taints: object) -> Iterable[Taint]:
    """Taints that keep pods away; those that the node controller sets for a node's state are in `available` already."""
    for taint in map(_map, _list(taints)):
        if taint.get("effect") in ("NoSchedule", "NoExecute") and not str(taint.get("key", "")).startswith("node.kubernetes.io/"):
            yield Taint(key=str(taint.get("key", "")), value=str(taint.get("value") or ""), effect=str(taint["effect"]))


def _amount(text: object, scale: int) -> int:
    try:
        return int(parse_quantity(str(text or 0)) * scale)
    except ValueError:
        return 0


def reduce_pod(pod: Mapping[str, Any]) -> PodUse | None:
    """What a pod holds, or None: no node yet, ended, or no accelerator."""
    metadata, spec = _map(pod.get("metadata")), _map(pod.get("spec"))
    node, phase = spec.get("nodeName"), _map(pod.get("status")).get("phase")
    if not isinstance(node, str) or not node or phase in ("Succeeded", "Failed"):
        return None
    requests = _pod_requests(spec)
    if not requests:
        return None
    service = _map(metadata.get("labels")).get(_SERVICE_LABEL)
    owner = f"{metadata.get('namespace', '')}/{service}" if service else ""
    return PodUse(str(metadata.get("uid", "")), node, tuple(sorted(requests.items())), owner)


def _pod_requests(spec: Mapping[str, Any]) -> dict[str, int]:
    """As the scheduler counts: containers and sidecars together, or an init container beside the sidecars before it, if that is more."""
    total: Counter[str] = Counter()
    for container in _list(spec.get("containers")):
        total.update(_container_requests(container))
    sidecars: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    for container in _list(spec.get("initContainers")):
        requests = _container_requests(container)
        if _map(container).get("restartPolicy") == "Always":
            sidecars.update(requests)
        peak |= sidecars | (sidecars + requests if _map(container).get("restartPolicy") != "Always" else sidecars)
    return dict((total + sidecars) | peak)


def _container_requests(container: object) -> Counter[str]:
    resources = _map(_map(container).get("resources"))
    wanted = {**_map(resources.get("limits")), **_map(resources.get("requests"))}
    counts = {str(name): _amount(amount, 1) for name, amount in wanted.items() if vendor_of(str(name))}
    return Counter({name: count for name, count in counts.items() if count > 0})


def cluster_facts(
    nodes: Iterable[NodeFacts] | None,
    pods: Iterable[PodUse] | None,
    *,
    reservations: Iterable[Reservation] = (),
    inventory: Inventory = Inventory(),
    credit: Collection[str] = (),
) -> ClusterFacts:
    """Facts with free devices counted. `credit`: uids of pods whose devices will be free, since the plan that is asked for replaces them.

    `nodes` None: not readable, only the inventory's pools are known. `pods` None: not readable, free devices are unknown.
    """
    live = sorted(nodes or (), key=attrgetter("name"))
    if pods is not None:
        used: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for pod in pods:
            if pod.uid not in credit:
                used[pod.node].update(dict(pod.requests))
        live = [node.less(used.get(node.name) or {}) for node in live]
        packing = Packing(live)
        for reservation in sorted(reservations, key=lambda r: (-r.count, r.service)):
            packing.take(reservation)
        live = packing.nodes()
    empty = [_pool_node(pool) for pool in inventory.pools if not any(_belongs(node, pool) for node in live)]
    return ClusterFacts(tuple(live) + tuple(empty), nodes_known=nodes is not None)


def _belongs(node: NodeFacts, pool: Pool) -> bool:
    return pool.describes(dict(node.labels)) if pool.node_selector else False


def _pool_node(pool: Pool) -> NodeFacts:
    """A node that the pool would have. Nothing of it is free: somebody has to start it first."""
    device = pool.device
    return NodeFacts(
        name=f"pool {pool.name}",
        labels=frozenset(pool.node_selector.items()),
        taints=tuple(taint for taint in pool.taints if taint.effect != "PreferNoSchedule"),
        available=False,
        offers=() if device is None else (Offer(device, pool.count, 0),),
        cpu_millis=(pool.host_cpu or 0) * 1000,
        memory_bytes=pool.host_memory or 0,
        live=False,
    )


class Packing:
    """Nodes whose devices are taken by planned pods: each pod's from the fullest node that can hold it, as a bin-packing scheduler would.

    A node's place in a queue is by its free devices; it gets another whenever some are taken, and the former counts no more.
    """

    def __init__(self, nodes: Sequence[NodeFacts]) -> None:
        self._nodes = nodes
        self._free: dict[str, list[int]] = {}
        """By resource, then node."""
        self._taken: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._queues: defaultdict[str, dict[object, tuple[set[int], list[tuple[int, int]]]]] = defaultdict(dict)
        """By resource, then what is asked of nodes: those that fit, and (free devices, node) as a heap."""

    def take(self, reservation: Reservation) -> None:
        """For as many of its pods as there is room; the others wait."""
        resource, count = reservation.resource, reservation.count
        if resource not in self._free:
            self._free[resource] = [_free_of(node, resource) for node in self._nodes]
        free, (_, queue) = self._free[resource], self._queue(reservation)
        for _ in range(reservation.pods):
            while queue and (queue[0][0] != free[queue[0][1]] or queue[0][0] < count):
                heapq.heappop(queue)
            if not queue:
                return
            index = queue[0][1]
            free[index] -= count
            self._taken[index][resource] += count
            for fitting, other in self._queues[resource].values():
                if index in fitting:
                    heapq.heappush(other, (free[index], index))

    def nodes(self) -> list[NodeFacts]:
        """All of them, with what is left."""
        return [_take(node, self._taken[index]) if index in self._taken else node for index, node in enumerate(self._nodes)]

    def _queue(self, reservation: Reservation) -> tuple[set[int], list[tuple[int, int]]]:
        resource, count, selector = reservation.resource, reservation.count, dict(reservation.node_selector)
        queues, free = self._queues[resource], self._free[resource]
        asked = (count, reservation.node_labels, reservation.node_selector, reservation.tolerations)
        if asked not in queues:
            fitting = {
                index
                for index, node in enumerate(self._nodes)
                if free[index] >= count
                and node.matches(reservation.node_labels, selector)
                and not untolerated(node, reservation.tolerations, resource)
            }
            queue = [(free[index], index) for index in fitting]
            heapq.heapify(queue)
            queues[asked] = fitting, queue
        return queues[asked]


def _free_of(node: NodeFacts, resource: str) -> int:
    return sum(offer.free or 0 for offer in node.offers if offer.device.resource == resource)


def _take(node: NodeFacts, counts: Mapping[str, int]) -> NodeFacts:
    def left(offer: Offer) -> Offer:
        taken = counts.get(offer.device.resource, 0)
        return replace(offer, free=(offer.free or 0) - taken) if taken else offer

    return replace(node, offers=tuple(left(offer) for offer in node.offers))


def untolerated(node: NodeFacts, tolerations: Iterable[Toleration], resource: str = "") -> Taint | None:
    """The first taint that keeps a pod off the node. One named like its resource is tolerated anyway: it says `GPU pods only`."""
    for taint in node.taints:
        if taint.key != resource and not any(_tolerates(toleration, taint) for toleration in tolerations):
            return taint
    return None


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    if toleration.effect is not None and toleration.effect != taint.effect:
        return False
    if toleration.key is None:
        return True
    return toleration.key == taint.key and (toleration.operator == "Exists" or (toleration.value or "") == taint.value)
