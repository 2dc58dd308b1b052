"""CustomResourceDefinitions: waiting for our own, and those of others, from where they are made, for as long as a test wants them.

`kubectl wait` fails on one whose conditions are not there yet, instead of waiting for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.binaries import find
from gantline_devcluster.client import ApiError
from gantline_devcluster.errors import DevclusterError
from gantline_operator.resource import GROUP, PLURAL, VERSION
from gantline_operator.resources import MANAGED_KINDS, ManagedKind

__all__ = ["defined", "definition", "every_kind", "is_known", "wait_until_established", "wait_until_served"]

_DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def definition(name: str) -> dict[str, Any]:
    """The definition in the file `name`, as its project has it."""
    try:
        found: dict[str, Any] = yaml.load(find(name).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except DevclusterError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return found


@contextmanager
def defined(cluster: ApiCluster, *files: str) -> Iterator[None]:
    """The cluster with these definitions, which go at the end, with all objects of theirs: other tests are of clusters without."""
    definitions = [definition(file) for file in files]
    names = [item["metadata"]["name"] for item in definitions]
    for item in definitions:
        cluster.client.post(_DEFINITIONS, item)
    try:
        wait_until_established(cluster, *names)
        for item in definitions:
            _wait_until_listed(cluster, item)
        yield
    finally:
        for name in names:
            cluster.client.call("DELETE", f"{_DEFINITIONS}/{name}")
        for name in names:
            _wait_until_gone(cluster, name)


@contextmanager
def every_kind(cluster: ApiCluster) -> Iterator[None]:
    """The cluster with every kind that the operator can make, its own but for InferenceService."""
    with defined(cluster, *(f"{kind.plural}.yaml" for kind in MANAGED_KINDS if kind.optional and not is_known(cluster, kind))):
        yield


def is_known(cluster: ApiCluster, kind: ManagedKind) -> bool:
    """Whether the cluster serves the kind, as discovery tells it."""
    root = "/apis" if "/" in kind.api_version else "/api"
    try:
        listed = cluster.client.get(f"{root}/{kind.api_version}")["resources"]
    except ApiError as error:
        if error.status != 404:
            raise
        return False
    return any(item["name"] == kind.plural for item in listed)


def _wait_until_listed(cluster: ApiCluster, item: dict[str, Any], timeout_s: float = 30.0) -> None:
    """Until the API server tells of the kind and answers for it: both come a moment after it is established."""
    group, names, version = item["spec"]["group"], item["spec"]["names"], item["spec"]["versions"][0]["name"]
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            known = {resource["name"] for resource in cluster.client.get(f"/apis/{group}/{version}")["resources"]}
            cluster.client.get(f"/apis/{group}/{version}/{names['plural']}?limit=1")
            if names["plural"] in known:
                return
        except ApiError as error:
            if error.status not in (404, 429, 503):
                raise
        assert time.monotonic() < deadline, f"{names['plural']}.{group} is never served"
        time.sleep(0.1)


def _wait_until_gone(cluster: ApiCluster, name: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any(item["metadata"]["name"] == name for item in cluster.client.get(_DEFINITIONS)["items"]):
        assert time.monotonic() < deadline, f"{name} is still there after {timeout_s:.0f} s"
        time.sleep(0.1)


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
        while not _established(cluster.client.get(f"{_DEFINITIONS}/{name}")):
            assert time.monotonic() < deadline, f"{name} was not accepted within {timeout_s:.0f} s"
            time.sleep(0.05)


def _established(definition: dict[str, Any]) -> bool:
    conditions = (definition.get("status") or {}).get("conditions") or []
    return any(item["type"] == "Established" and item["status"] == "True" for item in conditions)
