"""The operator on a real API server, through kubectl: from a manifest to children and conditions."""

from __future__ import annotations

import pytest
from gantline_devcluster.api_only import ApiCluster

from tests.operator.harness import FACTS, TINY, answer, apply, assert_converged, children, install_crd, service, serving, status, wait_reason


@pytest.fixture(scope="module", autouse=True)
def crd(api_cluster: ApiCluster) -> None:
    install_crd(api_cluster)


def test_a_cpu_service_goes_from_manifest_to_ready(simulated_nodes: ApiCluster, namespace: str) -> None:
    cluster = simulated_nodes
    cluster.simulate("cpu", 2)
    cluster.set_fate({"gantline.io/role": "inspect"}, "complete", message=answer(facts=TINY), namespace=namespace)
    with serving(cluster, namespace):
        apply(cluster, service("chat", namespace))
        wait_reason(cluster, "chat", namespace, "Ready")
    print(status(cluster, "chat", namespace), children(cluster, namespace))
