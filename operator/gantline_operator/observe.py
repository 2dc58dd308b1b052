"""What the operator knows about the whole cluster: nodes, and where other pods hold accelerators. And how it lists one service's pods.

Nodes and pods are kept by an own paginated list and watch, each object reduced at once to the few fields that count: kopf's indices keep
ghosts after a relist and start in quadratic time. Where the right to list is missing (a namespaced install) the answer is None, unknown,
and the scheduler decides; the right is asked for again now and then.

    list by pages -> replace all -> watch from that version -> (stream ends: watch on) -> (version too old: list again)
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Generic, TypeVar

from gantline_operator.client import ApiError, Client, Forbidden, Gone, KindMissing, NotFound, Object, Raw, Resource, parse, read_head
from gantline_operator.dynamic_devices import ANY_CLASS_SINCE, Claim, DeviceClass, DynamicFacts, Slice, read_claim, read_class, read_slice
from gantline_operator.facts import ClusterFacts, NodeFacts, PodUse, Reservation, cluster_facts, read_node, reduce_pod
from gantline_operator.fields import SpecError
from gantline_operator.inventory import Inventory, parse_inventory
from gantline_operator.settings import OperatorSettings
from gantline_operator.workqueue import RETURN_S, backoff_s

__all__ = ["CONFIG_MAPS", "NODES", "PODS", "ClusterView", "Mirror"]

NODES = Resource("v1", "Node", "nodes")
PODS = Resource("v1", "Pod", "pods")
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
SLICES, DEVICE_CLASSES, CLAIMS = (
    Resource("resource.k8s.io/v1", kind, plural)
    for kind, plural in (("ResourceSlice", "resourceslices"), ("DeviceClass", "deviceclasses"), ("ResourceClaim", "resourceclaims"))
)

T = TypeVar("T")

_log = logging.getLogger(__name__)

_WATCH_S = 300
_REFUSED_RETRY_S = 300.0
_INVENTORY_POLL_S = 60.0


class Mirror(Generic[T]):
    """All objects of one kind, reduced; of all namespaces or of one, those that a label selector finds, the one of a name, or all.

    `reduce` answers what is kept of an object, None for nothing. `changed` is told of those that differ now, by uid: as they were and as
    they are, also where a new list tells of it. `items` is None until the first list, and while listing is refused.
    """

    def __init__(
        self,
        client: Client,
        resource: Resource,
        reduce: Callable[[Raw], T | None],
        changed: Callable[[Mapping[str, T], Mapping[str, T]], None],
        *,
        namespace: str | None = None,
        selector: str = "",
        name: str = "",
        refused_retry_s: float = _REFUSED_RETRY_S,
        watch_s: int = _WATCH_S,
    ) -> None:
        self.items: dict[str, T] | None = None
        self.known = asyncio.Event()
        """Set once there is an answer, be it that we may not know."""
        self._client = client
        self._resource = resource
        self._reduce = reduce
        self._changed = changed
        self._namespace = namespace
        self._query = {"labelSelector": selector} if selector else {}
        if name:
            self._query["fieldSelector"] = f"metadata.name={name}"
        self._refused_retry_s = refused_retry_s
        self._watch_s = watch_s

    async def run(self) -> None:
        """Until cancelled. Never raises an ApiError: what is wrong is logged once per kind of trouble, and tried again."""
        failures = 0
        while True:
            try:
                version = await self._list()
                failures = 0
                while True:
                    version = await self._follow(version)
            except Gone:
                continue
            except (Forbidden, KindMissing) as error:
                _log.warning("Not allowed to list %s, so that what they tell stays unknown: %s", self._resource.plural, error)
                self._replace(None)
                await asyncio.sleep(self._refused_retry_s * random.uniform(0.8, 1.2))
            except ApiError as error:
                failures += 1
                _log.info("Listing or watching %s failed, trying again: %s", self._resource.plural, error)
                await asyncio.sleep(max(error.retry_after_s, backoff_s(failures, random.random(), cap_s=RETURN_S)))

    async def _list(self) -> str:
        items: dict[str, T] = {}
        version = ""
        async for page in self._client.pages(self._resource, self._namespace, **self._query):
            version = page.metadata.resource_version
            for item in page.items or ():
                self._put(items, read_head(item).uid, item)
        self._replace(items)
        return version

    async def _follow(self, version: str) -> str:
        """Watches until the server ends the stream; the version to go on from."""
        async for event in self._client.watch(self._resource, self._namespace, version, timeout_s=self._watch_s, **self._query):
            head = read_head(event.object)
            version = head.resource_version
            if event.type == "BOOKMARK":
                continue
            assert self.items is not None, "a list came before the watch"
            before = {head.uid: self.items.pop(head.uid)} if head.uid in self.items else {}
            after: dict[str, T] = {}
            if event.type != "DELETED":
                self._put(after, head.uid, event.object)
            self.items |= after
            if after != before:
                self._changed(before, after)
        return version

    def _put(self, items: dict[str, T], uid: str, item: Raw) -> None:
        reduced = self._reduce(item)
        if reduced is not None:
            items[uid] = reduced

    def _replace(self, items: dict[str, T] | None) -> None:
        before, after = self.items or {}, items or {}
        differ = [uid for uid in before.keys() | after.keys() if before.get(uid) != after.get(uid)]
        unknown = (self.items is None) != (items is None)
        self.items = items
        if differ or unknown:
            self._changed(*({uid: found[uid] for uid in differ if uid in found} for found in (before, after)))
        self.known.set()


class ClusterView:
    """Nodes, pods and the inventory of pools, kept up to date. `changed` is called when a plan may come out otherwise."""

    def __init__(self, client: Client, settings: OperatorSettings, changed: Callable[[], None]) -> None:
        self._client = client
        self._settings = settings
        self._changed = changed
        self._inventory = Inventory()
        self._inventory_data: Mapping[str, str] = {}
        self._nodes: Mirror[Object] = Mirror(client, NODES, lambda raw: _trimmed_node(parse(raw)), self._nodes_changed)
        self._pods: Mirror[PodUse] = Mirror(client, PODS, lambda raw: reduce_pod(parse(raw)), self._pods_changed)
        self._node_facts: dict[str, tuple[Object, NodeFacts]] = {}
        self._live: list[NodeFacts] | None = None
        """Of all nodes; None: to be put together, once for each change."""
        self._fleet: ClusterFacts | None = None
        self._bound: Counter[str] | None = None
        self._slices: Mirror[Slice] = Mirror(client, SLICES, lambda raw: read_slice(parse(raw)), self._dynamic_changed)
        self._classes: Mirror[DeviceClass] = Mirror(client, DEVICE_CLASSES, lambda raw: read_class(parse(raw)), self._dynamic_changed)
        self._claims: Mirror[Claim] = Mirror(client, CLAIMS, lambda raw: read_claim(parse(raw)), self._dynamic_changed)
        self._dynamic: DynamicFacts | None = None
        self._any_class = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._settings.observe_nodes == "auto":
                tasks.create_task(self._watch_dynamic(tasks))
                tasks.create_task(self._nodes.run())
                tasks.create_task(self._pods.run())
            if self._settings.inventory_configmap:
                tasks.create_task(self._poll_inventory())

    async def known(self) -> None:
        """Waits until nodes and pods were listed or refused: to plan before would find an empty cluster."""
        if self._settings.observe_nodes == "auto":
            await self._nodes.known.wait()
            await self._pods.known.wait()
            await self._slices.known.wait()
            await self._classes.known.wait()

    def facts(self, reservations: Iterable[Reservation], credit: Collection[str]) -> ClusterFacts:
        """The cluster as it is now, less what is planned for other services, as if the pods with the uids in `credit` were gone."""
        pods = None if self._pods.items is None else [*self._pods.items.values(), *self._dynamic_facts().uses]
        return cluster_facts(self._live_nodes(), pods, reservations=reservations, inventory=self._inventory, credit=credit)

    def fleet(self) -> ClusterFacts:
        """The cluster as it is now, whoever holds its devices: what is free is unknown. Made once for each change of the nodes."""
        if self._fleet is None:
            self._fleet = cluster_facts(self._live_nodes(), None, inventory=self._inventory)
        return self._fleet

    def _live_nodes(self) -> list[NodeFacts] | None:
        if self._live is None and self._nodes.items is not None:
            dynamic = self._dynamic_facts()
            self._live = [dynamic.add_to(self._read(uid, node)) for uid, node in self._nodes.items.items()]
        return self._live

    def bound_pods(self) -> Counter[str]:
        """Pods that hold devices of a node, by `namespace/name` of the service they belong to."""
        if self._bound is None:
            self._bound = Counter(pod.service for pod in (self._pods.items or {}).values() if pod.service)
        return self._bound

    def pods_of(self, service: str) -> list[str]:
        """uids of the pods of a service (`namespace/name`) that hold devices of a node."""
        return [pod.uid for pod in (self._pods.items or {}).values() if pod.service == service]

    def _read(self, uid: str, node: Object) -> NodeFacts:
        """Read once: a node's object is replaced whenever it changes."""
        seen, result = self._node_facts.get(uid, (None, None))
        if seen is not node or result is None:
            result = read_node(node, self._inventory)
            self._node_facts[uid] = (node, result)
        return result

    async def _watch_dynamic(self, tasks: asyncio.TaskGroup) -> None:
        """Where the cluster knows dynamic resources; asked once, as it comes with an upgrade of the API server."""
        failures = 0
        while True:
            try:
                served = await self._client.serves(SLICES)
                self._any_class = await self._client.version() >= ANY_CLASS_SINCE
                break
            except ApiError as error:
                failures += 1
                await asyncio.sleep(max(error.retry_after_s, backoff_s(failures, random.random(), cap_s=RETURN_S)))
        for mirror in (self._slices, self._classes, self._claims):
            if served:
                tasks.create_task(mirror.run())
            else:
                mirror.known.set()

    def _nodes_changed(self, *_: object) -> None:
        self._live = self._fleet = None
        self._changed()

    def _pods_changed(self, *_: object) -> None:
        self._bound = None
        self._changed()

    def _dynamic_changed(self, *_: object) -> None:
        self._dynamic = None
        self._nodes_changed()

    def _dynamic_facts(self) -> DynamicFacts:
        """Put together once for each change: a thousand nodes have thousands of devices."""
        if self._dynamic is None:
            slices, classes, claims = self._slices.items or {}, self._classes.items or {}, self._claims.items or {}
            self._dynamic = DynamicFacts(slices.values(), classes.values(), claims.values(), any_class=self._any_class)
        return self._dynamic

    async def _poll_inventory(self) -> None:
        while True:
            try:
                await self._read_inventory()
            except (ApiError, SpecError) as error:
                _log.warning("ConfigMap %s cannot be used as inventory: %s", self._settings.inventory_configmap, error)
            await asyncio.sleep(_INVENTORY_POLL_S * random.uniform(0.8, 1.2))

    async def _read_inventory(self) -> None:
        namespace, _, name = self._settings.inventory_configmap.partition("/")
        try:
            data = (await self._client.get(CONFIG_MAPS, namespace, name)).get("data") or {}
        except NotFound:
            data = {}
        if data != self._inventory_data:
            self._inventory, self._inventory_data = parse_inventory(data), data
            self._node_facts.clear()
            self._nodes_changed()


def _trimmed_node(node: Object) -> Object:
    """What `read_node` may look at; the rest (images, addresses, heartbeats) is most of a node and changes every few seconds."""
    metadata, spec, status = node["metadata"], node.get("spec") or {}, node.get("status") or {}
    conditions = [{"type": item["type"], "status": item["status"]} for item in status.get("conditions") or []]
    info = status.get("nodeInfo") or {}
    versions = {key: info[key] for key in ("containerRuntimeVersion", "kubeletVersion") if key in info}
    amounts = {key: status.get(key) or {} for key in ("allocatable", "capacity")}
    return {
        "metadata": {"name": metadata["name"], "labels": metadata.get("labels") or {}},
        "spec": {key: spec[key] for key in ("unschedulable", "taints") if key in spec},
        "status": {**amounts, "conditions": conditions, "nodeInfo": versions},
    }
