"""Keeps the directory as the API server has it: lists and watches InferenceServices and the EndpointSlices of what serves them.

list ──> watch ──(ended)──> watch from the last version
  ^        └──(410, any error)──> wait, list again: what vanished meanwhile is dropped then
  └── while the API server is away, the last known services stay
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gantline_runtime import logs

from gantline_gateway.cluster_api import ApiUnavailable, ClusterApi, Expired, Kind, Object
from gantline_gateway.cluster_objects import ENDPOINTS, SERVICES, build_catalog
from gantline_gateway.directory import Directory

__all__ = ["Discovery"]

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0
_SHORTEST_WATCH_S = 1.0
_COLLECT_S = 0.02
"""Changes come in bursts, and one catalog for a burst is enough."""

log = logging.getLogger("gantline.gateway")


@dataclass
class _Mirror:
    """The objects of one kind in one namespace (None: all), by uid. `changed` is called after every change."""

    api: ClusterApi
    kind: Kind
    namespace: str | None
    changed: Callable[[], None]
    objects: dict[str, Object] = field(default_factory=dict)
    known: bool = False
    _pause_s: float = _FIRST_PAUSE_S

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                version = await self._list()
                while True:
                    version = await self._watch(version)
            except ApiUnavailable as error:
                await self._pause(error)

    async def _pause(self, error: ApiUnavailable) -> None:
        pause_s = self._pause_s * random.uniform(0.5, 1.0)  # so that gateways do not come back in step
        if not isinstance(error, Expired):
            fields = logs.fields(kind=self.kind.plural, namespace=self.namespace, cause=str(error), again_in=round(pause_s, 1))
            log.warning("the API server cannot be followed; the last known services stay", extra=fields)
        self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 2)
        await asyncio.sleep(pause_s)

    async def _list(self) -> str:
        found, version = await self.api.list(self.kind, self.namespace)
        self.objects, self.known = {item["metadata"]["uid"]: item for item in found}, True
        self.changed()
        self._pause_s = _FIRST_PAUSE_S
        return version

    async def _watch(self, version: str) -> str:
        """The version to go on from when the server has ended the watch."""
        began = asyncio.get_running_loop().time()
        async for event in self.api.watch(self.kind, self.namespace, version):
            item = event["object"]
            version = item["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self.objects.pop(item["metadata"]["uid"], None)
            elif event["type"] in ("ADDED", "MODIFIED"):
                self.objects[item["metadata"]["uid"]] = item
            if event["type"] != "BOOKMARK":
                self.changed()
        if asyncio.get_running_loop().time() - began < _SHORTEST_WATCH_S:
            raise ApiUnavailable("the API server ended a watch at once")
        return version


class Discovery:
    """Of `namespaces`, or of the whole cluster if there are none. Make it on the event loop."""

    def __init__(self, api: ClusterApi, directory: Directory, namespaces: Sequence[str] = ()) -> None:
        self._directory = directory
        self._changed = asyncio.Event()
        scopes: Sequence[str | None] = namespaces or (None,)
        self._services = [_Mirror(api, SERVICES, scope, self._changed.set) for scope in scopes]
        self._slices = [_Mirror(api, ENDPOINTS, scope, self._changed.set) for scope in scopes]

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for mirror in self._mirrors:
                group.create_task(mirror.run())
            group.create_task(self._publish())

    @property
    def _mirrors(self) -> list[_Mirror]:
        return [*self._services, *self._slices]

    async def _publish(self) -> None:
        """Nothing before all is known: a service whose replicas are not listed yet would seem to have none."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_COLLECT_S)
            self._changed.clear()
            if all(mirror.known for mirror in self._mirrors):
                self._directory.publish(build_catalog(_all(self._services), _all(self._slices)))


def _all(mirrors: Sequence[_Mirror]) -> list[Mapping[str, object]]:
    return [item for mirror in mirrors for item in mirror.objects.values()]
