"""Waiting for our CustomResourceDefinition. `kubectl wait` fails on one whose conditions are not there yet, instead of waiting for them."""

from __future__ import annotations

import time

from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError
from gantline_operator.resource import GROUP, PLURAL, VERSION

__all__ = ["wait_until_served"]


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
