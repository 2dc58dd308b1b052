"""Waiting for our CustomResourceDefinition. `kubectl wait` fails on one whose conditions are not there yet, instead of waiting for them."""

from __future__ import annotations

import time
from typing import Any

from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError
from gantline_operator.resource import GROUP, PLURAL, VERSION

__all__ = ["wait_until_established", "wait_until_served"]


def wait_until_served(cluster: ApiCluster, timeout_s: float = 30.0) -> None:
    """Until the API server lists the kind and answers for it."""
    deadline = time.monotonic() + timeout_s
    while not _is_served(cluster):
        assert time.monotonic() < deadline, f"{PLURAL}.{GROUP} is never served"
        time.sleep(0.1)


def _is_served(cluster: ApiCluster) -> bool:
    try:
        known = cluster.client.get(f"/apis/{GROUP}/{VERSION}")["resources"]
        cluster.client.get(f"/apis/{GROUP}/{VERSION}/{PLURAL}?limit=1")
    except ApiError:
        return False
    return any(resource["name"] == f"{PLURAL}/scale" for resource in known)


def wait_until_established(cluster: ApiCluster, *names: str, timeout_s: float = 30.0) -> None:
    """Until the definitions are accepted. `kubectl wait` gives up at once on one that is so new that it has no conditions yet."""
    deadline = time.monotonic() + timeout_s
    for name in names:
        while not _established(cluster.client.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")):
            assert time.monotonic() < deadline, f"{name} was not accepted within {timeout_s:.0f} s"
            time.sleep(0.05)


def _established(definition: dict[str, Any]) -> bool:
    conditions = (definition.get("status") or {}).get("conditions") or []
    return any(item["type"] == "Established" and item["status"] == "True" for item in conditions)
