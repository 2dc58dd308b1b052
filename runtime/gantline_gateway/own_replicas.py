"""How many gateways there are, over which limits are split: the ready endpoints of the gateway's own Service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gantline_gateway.cluster_api import ClusterApi, Kind
from gantline_gateway.mirror import Mirror

__all__ = ["OwnReplicas", "count_ready"]


class OwnReplicas:
    """Tells `tell` how many there are whenever that may have changed, at least one: whoever asks is one. Make it on the event loop."""

    def __init__(self, api: ClusterApi, namespace: str, service: str, tell: Callable[[int], None]) -> None:
        self._tell = tell
        kind = Kind("discovery.k8s.io/v1", "endpointslices", selector=f"kubernetes.io/service-name={service}")
        self._mirror = Mirror(api, kind, namespace, self._count)

    async def run(self) -> None:
        """Until cancelled."""
        await self._mirror.run()

    def _count(self) -> None:
        self._tell(max(1, count_ready(self._mirror.objects.values())))


def count_ready(slices: Iterable[Mapping[str, Any]]) -> int:
    """Pods, or addresses where no pod is named, that take new requests; one that is in two slices, or has two addresses, counts once."""
    ready = set()
    for item in slices:
        for endpoint in item.get("endpoints") or []:
            conditions = endpoint.get("conditions") or {}
            if conditions.get("ready") is not False and conditions.get("terminating") is not True:
                target = endpoint.get("targetRef") or {}
                ready.add(target.get("uid") or target.get("name") or tuple(endpoint.get("addresses") or ()))
    return len(ready)
