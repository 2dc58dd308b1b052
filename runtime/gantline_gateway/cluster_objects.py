"""From InferenceServices and EndpointSlices, as the API server gives them, to a catalog. What is odd is left out."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gantline_gateway.catalog import DEFAULT_STARTUP_S, Catalog, Replica, Service
from gantline_gateway.cluster_api import Kind

__all__ = ["ENDPOINTS", "SERVICES", "CatalogBuilder", "parse_duration"]

SERVICES = Kind("gantline.io/v1alpha1", "inferenceservices")
ENDPOINTS = Kind("discovery.k8s.io/v1", "endpointslices", selector="gantline.io/role=server")
"""Slices carry their Service's labels, and these are only on Services that the operator made."""

_SERVICE_NAME = "kubernetes.io/service-name"
_PORT_NAME = "http"
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}

Object = Mapping[str, Any]


class CatalogBuilder:
    """Builds catalogs one after the other. Each version of an object is read once: with hundreds of services, most change rarely."""

    def __init__(self) -> None:
        self._services: dict[str, tuple[str, Service]] = {}
        self._slices: dict[str, tuple[str, _Slice]] = {}

    def build(self, services: Iterable[Object], slices: Iterable[Object]) -> Catalog:
        """A service's children have its name: so its slices are those of the Service of that name."""
        self._services = dict(_read(services, self._services, _service))
        self._slices = dict(_read(slices, self._slices, _slice))
        by_owner: dict[str, list[tuple[Replica, ...]]] = {}
        for _, item in self._slices.values():
            by_owner.setdefault(item.owner, []).append(item.replicas)
        found = (service for _, service in self._services.values())
        return Catalog.of(_with_replicas(service, by_owner.get(service.key)) for service in found)


@dataclass(frozen=True)
class _Slice:
    owner: str
    """`namespace/name` of the service."""
    replicas: tuple[Replica, ...]


T = TypeVar("T")


def _read(items: Iterable[Object], known: Mapping[str, tuple[str, T]], read: Callable[[Object], T]) -> Iterable[tuple[str, tuple[str, T]]]:
    """For each object's uid its version and what was read of it: now, or of the same version before."""
    for item in items:
        uid, version = item["metadata"]["uid"], item["metadata"]["resourceVersion"]
        before = known.get(uid)
        yield uid, before if before is not None and before[0] == version else (version, read(item))


def _with_replicas(service: Service, slices: list[tuple[Replica, ...]] | None) -> Service:
    if not slices:
        return service
    found: dict[str, Replica] = {}
    for replica in itertools.chain.from_iterable(slices):
        known = found.get(replica.identity)
        # While a pod moves from one slice to another it is in both; the slice that says more good of it is the newer one.
        if known is None or (replica.ready, replica.serving) > (known.ready, known.serving):
            found[replica.identity] = replica
    return replace(service, replicas=tuple(found[identity] for identity in sorted(found)))


def _slice(item: Object) -> _Slice:
    meta = item["metadata"]
    return _Slice(f"{meta.get('namespace', '')}/{(meta.get('labels') or {}).get(_SERVICE_NAME, '')}", tuple(_replicas(item)))


def _service(item: Object) -> Service:
    meta, spec, status = item["metadata"], item.get("spec") or {}, item.get("status") or {}
    return Service(
        namespace=str(meta["namespace"]),
        name=str(meta["name"]),
        served_name=str((spec.get("model") or {}).get("servedName") or ""),
        wanted=_whole(spec.get("replicas"), 1),
        suspended=spec.get("suspend") is True,
        wakes=_wakes(spec),
        startup_s=_startup_s(status),
        trouble=_trouble(status),
        created=_unix_time(str(meta.get("creationTimestamp", ""))),
        session_len=_whole((status.get("plan") or {}).get("sessionLen"), None),
    )


def _wakes(spec: Object) -> bool:
    """Whether an autoscaler may have it at zero, and so wakes it: by hand scaled to zero, it stays there."""
    scaling = spec.get("scaling")
    return isinstance(scaling, Mapping) and scaling.get("min") == 0


def _trouble(status: Object) -> str:
    conditions = status.get("conditions") or []
    return next((str(item.get("reason", "")) for item in conditions if item.get("type") == "Ready" and item.get("status") == "False"), "")


def _startup_s(status: Object) -> float:
    measured = parse_duration(str((status.get("startup") or {}).get("total", "")))
    predicted = _whole((status.get("plan") or {}).get("loadSeconds"), None)
    return measured or predicted or DEFAULT_STARTUP_S


def parse_duration(text: str) -> float | None:
    """Seconds of `1h2m3.5s`; None for what is none."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _replicas(item: Object) -> Iterable[Replica]:
    port = next((port.get("port") for port in item.get("ports") or [] if port.get("name") == _PORT_NAME), None)
    if not isinstance(port, int) or item.get("addressType") not in ("IPv4", "IPv6"):
        return
    for endpoint in item.get("endpoints") or []:
        conditions = endpoint.get("conditions") or {}
        ready = conditions.get("ready") is not False  # unknown counts as true, says the API
        serving, terminating = conditions.get("serving", ready) is not False, conditions.get("terminating") is True
        for address in (endpoint.get("addresses") or [])[:1]:  # further ones have no meaning, says the API
            identity = str((endpoint.get("targetRef") or {}).get("name") or f"{address}:{port}")
            yield Replica(identity, str(address), port, ready=ready, serving=serving, terminating=terminating)


def _whole(value: Any, default: Any) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _unix_time(text: str) -> int:
    try:
        return int(datetime.datetime.fromisoformat(text).timestamp())
    except ValueError:
        return 0
