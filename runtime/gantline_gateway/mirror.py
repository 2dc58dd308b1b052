"""The objects of one kind as the API server has them: listed and watched, for as long as anybody is interested.

list ──> watch ──(ended)──> watch from the last version
  ^        └──(410, any error)──> wait, list again: what vanished meanwhile is dropped then
  └── while the API server is away, the last known objects stay
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from gantline_runtime import logs

from gantline_gateway.cluster_api import ApiUnavailable, ClusterApi, Expired, Kind, Object

__all__ = ["Mirror"]

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 20.0
_SHORTEST_WATCH_S = 1.0

log = logging.getLogger("gantline.gateway")


@dataclass
class Mirror:
    """In one namespace (None: all), by uid. `changed` is called after every change, and after every listing."""

    api: ClusterApi
    kind: Kind
    namespace: str | None
    changed: Callable[[], None]
    objects: dict[str, Object] = field(default_factory=dict)
    known: bool = False
    """Whether they have been listed."""
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
            log.warning("the API server cannot be followed; the last known objects stay", extra=fields)
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
