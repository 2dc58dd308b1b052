"""Objects of the Gateway API: only where the cluster has their kinds, and as the real definitions want them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError

from tests.operator.applying import apply as apply_object
from tests.operator.definition import defined
from tests.operator.harness import (
    TINY,
    apply,
    fates,
    inspected,
    install_crd,
    items,
    patch,
    service,
    serving,
    settled,
    status,
    wait,
    wait_reason,
)  # fmt: skip
from tests.operator.helm import render

Object = dict[str, Any]
ROUTE = "gateway.networking.k8s.io/v1/HTTPRoute"
PARENTS = [{"name": "public", "namespace": "gateways"}]


def routes(values: Object, *kinds: str) -> list[Object]:
    objects = render({"gateway": {"httpRoute": values}}, kinds=kinds)
    return [item for item in objects if item["kind"] == "HTTPRoute"]


@pytest.mark.parametrize(
    ("values", "kinds", "made"),
    [
        ({}, (ROUTE,), 0),
        ({"parentRefs": PARENTS}, (), 0),
        ({"parentRefs": PARENTS}, (ROUTE,), 1),
        ({"parentRefs": PARENTS, "enabled": False}, (ROUTE,), 0),
        ({"parentRefs": PARENTS, "enabled": True}, (), 1),
    ],
)
def test_a_route_is_made_where_gateways_are_named_and_the_kind_is_known(values: Object, kinds: tuple[str, ...], made: int) -> None:
    assert len(routes(values, *kinds)) == made


@pytest.fixture
def gateway_api(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    with defined(api_cluster, "httproutes.yaml", "inferencepools.yaml"):
        yield api_cluster


def test_both_kinds_are_as_their_definitions_want_them_and_pools_go_with_the_setting(gateway_api: ApiCluster, namespace: str) -> None:
    cluster = gateway_api
    (route,) = routes({"parentRefs": PARENTS, "hostnames": ["llm.example.com"]}, ROUTE)
    wait(lambda: _accepted(cluster, {**route, "metadata": {"name": "gateway", "namespace": namespace}}))

    install_crd(cluster)
    fates(cluster, inspected(pooled=TINY))
    if not cluster.client.get("/api/v1/nodes").get("items"):
        cluster.simulate("cpu", 1)
    pools = lambda: items(cluster, "inferencepools", namespace)
    with serving(cluster, namespace):
        apply(cluster, service("pooled", namespace))
        wait_reason(cluster, "pooled", namespace, "Ready")
        (pool,) = pools()
        patch(cluster, "pooled", namespace, {"engine": {"maxBatchSize": 3}})
        wait_reason(cluster, "pooled", namespace, "Ready")
        wait(lambda: status(cluster, "pooled", namespace)["observedGeneration"] == 2)
        wait(lambda: settled(cluster, namespace, 1.0))
        assert [item["metadata"]["uid"] for item in pools()] == [pool["metadata"]["uid"]], "another generation has the same pool"
    with serving(cluster, namespace) as operator:
        wait(lambda: "pooled" in operator.reconciled)
        wait(lambda: settled(cluster, namespace, 1.0))
        assert [item["metadata"]["uid"] for item in pools()] == [pool["metadata"]["uid"]], "and so has another operator"
    spec = pool["spec"]
    template = items(cluster, "deployments", namespace)[0]["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert spec["targetPorts"] == [{"number": template["spec"]["containers"][0]["ports"][0]["containerPort"]}]
    assert (spec["endpointPickerRef"]["name"], spec["endpointPickerRef"]["failureMode"]) == ("pooled-epp", "FailOpen")
    with serving(cluster, namespace, inference_pools="false"):
        wait(lambda: not pools())
        wait_reason(cluster, "pooled", namespace, "Ready")


def _accepted(cluster: ApiCluster, item: Object) -> bool:
    """Whether the API server takes it, strictly; a definition that is established is served a moment later."""
    try:
        apply_object(cluster.client, item, dry_run=True)
    except ApiError as error:
        if error.status == 404:
            return False
        raise
    return True
