"""Many services: a restarted operator changes nothing, and churn ends as it should. Figures are benchmarks/operator_scale.py's."""

from __future__ import annotations

from gantline_devcluster.api_only import ApiCluster

from tests.operator.churn import Churn
from tests.operator.harness import (
    TINY,
    apply,
    fates,
    inspected,
    install_crd,
    items,
    remove_gpu_nodes,
    service,
    serving,
    versions,
    wait,
    wait_reason,
)

NAMES = [f"many{index}" for index in range(12)]


def test_a_restarted_operator_verifies_everything_and_writes_no_change(api_cluster: ApiCluster, namespace: str) -> None:
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    fates(api_cluster, inspected(**dict.fromkeys(NAMES, TINY)))
    with serving(api_cluster, namespace):
        apply(api_cluster, *(service(name, namespace) for name in NAMES))
        for name in NAMES:
            wait_reason(api_cluster, name, namespace, "Ready")
        assert len(items(api_cluster, "jobs", namespace)) == len(NAMES)
        wait(lambda: all("ttlSecondsAfterFinished" in job["spec"] for job in items(api_cluster, "jobs", namespace)))
    before = versions(api_cluster, namespace)
    with serving(api_cluster, namespace) as operator:
        wait(lambda: sum("/deployments/" in path for _, path in operator.writes) >= len(NAMES))
        # All that it applied was as it stood: not one resourceVersion moved, no event was sent.
        assert versions(api_cluster, namespace) == before


def test_churn_ends_with_what_the_specs_ask_for(api_cluster: ApiCluster, namespace: str) -> None:
    """Seconds of what `python -m tests.operator.churn` does for half an hour."""
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    try:
        with Churn(api_cluster, namespace, services=3, seed=1) as churn:
            for _ in range(16):
                churn.step()
            churn.settle()
            assert len(churn.done) >= 5, churn.done
    finally:
        remove_gpu_nodes(api_cluster, namespace)
