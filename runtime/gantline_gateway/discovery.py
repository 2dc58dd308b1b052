"""Keeps the directory as the API server has it: InferenceServices, and the EndpointSlices of what serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from gantline_gateway.cluster_api import ClusterApi
from gantline_gateway.cluster_objects import ENDPOINTS, SERVICES, CatalogBuilder
from gantline_gateway.directory import Directory
from gantline_gateway.mirror import Mirror

__all__ = ["Discovery"]

_COLLECT_S = 0.02
"""Changes come in bursts, and one catalog for a burst is enough."""


class Discovery:
    """Of `namespaces`, or of the whole cluster if there are none. Make it on the event loop."""

    def __init__(self, api: ClusterApi, directory: Directory, namespaces: Sequence[str] = ()) -> None:
        self._directory = directory
        self._changed, self._builder = asyncio.Event(), CatalogBuilder()
        scopes: Sequence[str | None] = namespaces or (None,)
        self._services = [Mirror(api, SERVICES, scope, self._changed.set) for scope in scopes]
        self._slices = [Mirror(api, ENDPOINTS, scope, self._changed.set) for scope in scopes]

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for mirror in self._mirrors:
                group.create_task(mirror.run())
            group.create_task(self._publish())

    @property
    def _mirrors(self) -> list[Mirror]:
        return [*self._services, *self._slices]

    async def _publish(self) -> None:
        """Nothing before all is known: a service whose replicas are not listed yet would seem to have none."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_COLLECT_S)
            self._changed.clear()
            if all(mirror.known for mirror in self._mirrors):
                self._directory.publish(self._builder.build(_all(self._services), _all(self._slices)))


def _all(mirrors: Sequence[Mirror]) -> list[Mapping[str, object]]:
    return [item for mirror in mirrors for item in mirror.objects.values()]
