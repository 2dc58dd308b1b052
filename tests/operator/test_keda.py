"""Beside the real KEDA: `make test-keda`, which builds it. Of its definition alone the suite has the same (test_other_autoscalers.py)."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster, free_port

from tests.operator.harness import Operator, apply, event_reasons, patch, service, status, wait, wait_reason
from tests.operator.keda import logs, start_keda
from tests.operator.scaling_world import NAME, QUICK, answering, scaling, world
from tests.operator.test_other_autoscalers import autoscalers, get_http

pytestmark = pytest.mark.skipif(not os.environ.get("GANTLINE_KEDA"), reason="needs KEDA's build: make test-keda")
LONGEST_S = 180.0
"""KEDA looks every 5 s, and learns of a new kind within half a minute."""
BUSY = {"held": 0, "running": 12, "last_request_age_s": 0.1}


def test_keda_alone_scales_a_service_to_zero_and_wakes_it_for_a_held_request(api_cluster: ApiCluster, namespace: str) -> None:
    web, asked = free_port(), []

    def answer(path: str) -> str | None:
        """What the operator answers KEDA, noted down."""
        try:
            code, found = get_http(f"http://127.0.0.1:{web}{path}")
        except OSError:
            code, found = 0, {}
        asked.append((path, found.get("load")))
        return json.dumps(found) if code == 200 else None

    with (
        world(api_cluster, namespace, gateway=True) as made,
        answering("127.0.0.1", 0, answer) as port,
        scaling(made, metrics_port=web, load_url=f"http://127.0.0.1:{port}") as operator,
    ):
        start_keda(api_cluster)
        began = time.monotonic()

        def told(what: str) -> None:
            print(f"{time.monotonic() - began:5.1f} s: {what}")

        wanted = {"controller": "KEDA", "min": 0, "max": 3, "metric": "inflight", "target": 4, **QUICK, "downAfter": "0s"}
        apply(api_cluster, service(NAME, namespace, scaling=wanted))
        made.wait_replicas(1, timeout_s=LONGEST_S)
        wait(lambda: condition(api_cluster, namespace, "Ready") == "True", timeout_s=LONGEST_S, what=lambda: logs(api_cluster))
        wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
        told("KEDA accepts the ScaledObject")
        # Nobody asks: it sleeps.
        made.wait_replicas(0, timeout_s=LONGEST_S)
        told("asleep")
        # A held request wakes it, and its load makes it grow.
        held = time.monotonic()
        made.demand = {"held": 1, "held_since_s": 0.1, "running": 0, "last_request_age_s": 0.1}
        wait(lambda: made.replicas_wanted() == 1, timeout_s=LONGEST_S, what=lambda: logs(api_cluster))
        told(f"awake {time.monotonic() - held:.1f} s after a request was held")
        (first,) = made.wait_replicas(1)
        made.demand, made.replicas[first].running = BUSY, 12
        made.wait_replicas(3, timeout_s=LONGEST_S)
        told("three replicas for three replicas' worth of load")
        # What is not known changes nothing: KEDA says so, its autoscaler holds.
        for replica in made.replicas.values():
            replica.silent, replica.running = True, 0
        made.demand = {}
        wait(lambda: condition(api_cluster, namespace, "Ready") == "False", timeout_s=LONGEST_S, what=lambda: logs(api_cluster))
        wait(lambda: condition(api_cluster, namespace, "HPAActive") == "False", timeout_s=LONGEST_S)
        assert made.replicas_wanted() == 3
        told("held while the load is not known")
        for replica in made.replicas.values():
            replica.silent = False
        made.wait_replicas(0, timeout_s=LONGEST_S)
        told("asleep again")
        assert_only_keda_scaled(api_cluster, namespace, operator)
        # An operator that begins anew knows nothing yet, which wakes nobody. Its looks are as far apart as by default: KEDA sees each.
        operator.stop()
        assert {path for path, _ in asked} == {f"/load/{namespace}/{NAME}"} and {0.25, 3.0, None, 0.0} <= {load for _, load in asked}, asked
        asked.clear()
        with scaling(made, metrics_port=web, load_url=f"http://127.0.0.1:{port}", scaling_interval_seconds=5) as second:
            wait(lambda: [load for _, load in asked].count(0.0) >= 2, timeout_s=LONGEST_S, what=lambda: asked)
            assert made.replicas_wanted() == 0 and not any(load for _, load in asked), asked
            assert_only_keda_scaled(api_cluster, namespace, second)
            # Handed over: what KEDA made is gone, and Gantline wakes the service.
            patch(api_cluster, NAME, namespace, {"scaling": {"controller": "Gantline"}})
            wait(lambda: not scaled_objects(api_cluster, namespace) and not autoscalers(api_cluster, namespace), timeout_s=LONGEST_S)
            made.demand = {"held": 1, "held_since_s": 0.1, "running": 0, "last_request_age_s": 0.1}
            made.wait_replicas(1)
            wait(lambda: status(api_cluster, NAME, namespace).get("lastScale", {}).get("reason") == "HeldRequests")
            told("handed over to Gantline")


def scaled_objects(cluster: ApiCluster, namespace: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.client.get(f"/apis/keda.sh/v1alpha1/namespaces/{namespace}/scaledobjects").get("items") or []
    return found


def condition(cluster: ApiCluster, namespace: str, kind: str) -> str:
    """Of the ScaledObject, as KEDA says."""
    conditions = [item for found in scaled_objects(cluster, namespace) for item in found.get("status", {}).get("conditions") or []]
    return next((item["status"] for item in conditions if item["type"] == kind), "")


def assert_only_keda_scaled(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    assert not [path for _, path in operator.writes if path.endswith("/scale")], "KEDA has both ways"
    assert not [item for item in event_reasons(cluster, NAME, namespace) if item.startswith(("Scaled", "Woke"))]
    assert "lastScale" not in status(cluster, NAME, namespace)
