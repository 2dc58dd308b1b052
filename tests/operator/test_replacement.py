"""A pod whose GPU failed is replaced, its node told, and a loop of such pods slows down."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from gantline_devcluster.api_only import ApiCluster
from gantline_operator.conditions import Reason
from gantline_operator.pod_state import Trouble
from gantline_operator.replacement import Replacements, choose_replacement

from tests.operator.harness import (
    TINY,
    answer,
    apply,
    event_reasons,
    fates,
    inspected,
    install_crd,
    items,
    server_pods,
    service,
    serving,
    wait,
    wait_reason,
)
from tests.operator.test_status import pod

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAILED = Trouble(Reason.CUDA_ERROR, "an illegal memory access")


def test_only_a_pod_whose_gpu_failed_is_replaced_and_one_at_a_time() -> None:
    broken = [pod("b", ready=False, trouble=FAILED), pod("a", ready=False, trouble=FAILED)]
    assert choose_replacement([pod("0"), *broken]) == broken[1]
    others = [Trouble(reason, "") for reason in (Reason.CUDA_OUT_OF_MEMORY, Reason.OUT_OF_MEMORY, Reason.INTERNAL_ERROR)]
    assert choose_replacement([pod(ready=False, trouble=trouble) for trouble in others]) is None
    assert choose_replacement([pod(ready=False, trouble=FAILED, deleting=True)]) is None


def test_each_replacement_waits_twice_as_long_as_the_one_before_and_an_hour_forgets() -> None:
    found, now, waits = Replacements(), NOW, []
    for _ in range(10):
        now = found.due(now)
        found = found.after(now)
        waits.append((found.due(now) - now).total_seconds())
    assert waits == [10, 20, 40, 80, 160, 320, 600, 600, 600, 600]
    later = now + timedelta(hours=1, seconds=1)
    assert found.due(later) == later and found.after(later).count == 1


def test_a_pod_whose_gpu_failed_gives_way_to_another_and_its_node_is_told(api_cluster: ApiCluster, namespace: str) -> None:
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    fates(api_cluster, inspected(xid=TINY))
    with serving(api_cluster, namespace):
        apply(api_cluster, service("xid", namespace))
        wait_reason(api_cluster, "xid", namespace, "Ready")
        (first,) = server_pods(api_cluster, "xid", namespace)
        message = answer("CudaError", message="an illegal memory access was encountered", cure="Restart it.")
        marks = [f"simulated.gantline.io/termination-message={message}", "simulated.gantline.io/fate=crash-loop"]
        api_cluster.kubectl("annotate", "--overwrite", f"pod/{first['metadata']['name']}", "-n", namespace, *marks)
        wait(lambda: first["metadata"]["uid"] not in [item["metadata"]["uid"] for item in server_pods(api_cluster, "xid", namespace)])
        wait_reason(api_cluster, "xid", namespace, "Ready")
        wait(lambda: "CudaError" in event_reasons(api_cluster, "xid", namespace))
    told = [item["note"] for item in items(api_cluster, "events", namespace) if item["reason"] == "CudaError"]
    assert f"A GPU of node {first['spec']['nodeName']} failed: an illegal memory access" in told[0]
