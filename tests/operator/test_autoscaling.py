"""Autoscaling through the API server: replicas and gateways are real HTTP servers, pods are simulated."""

from __future__ import annotations

import time
from dataclasses import replace

from gantline_devcluster.api_only import ApiCluster
from gantline_operator.autoscaling.loop import Autoscaler
from gantline_operator.autoscaling.policy import Policy
from gantline_operator.autoscaling.targets import Target, Targets
from gantline_operator.client import connect

from tests.operator.harness import (
    SETTINGS,
    apply,
    event_reasons,
    get,
    install_crd,
    patch,
    reason,
    server_pods,
    service,
    status,
    versions,
    wait,
    wait_reason,
)
from tests.operator.scaling_world import NAME, QUICK, owners_of_replicas, scaling, world


def test_a_service_sleeps_wakes_grows_and_loses_its_least_busy_replicas(api_cluster: ApiCluster, namespace: str) -> None:
    with world(api_cluster, namespace, gateway=True) as made, scaling(made):
        apply(api_cluster, service(NAME, namespace, scaling={"min": 0, "max": 3, "metric": "inflight", "target": 4, **QUICK}))
        made.wait_replicas(1)
        # Nobody asks: it sleeps, and says that it can be woken.
        made.wait_replicas(0)
        asleep = wait_reason(api_cluster, NAME, namespace, "ScaledToZero", "Servable")
        assert asleep["status"] == "True" and "next request" in asleep["message"]
        assert status(api_cluster, NAME, namespace)["lastScale"].items() >= {"from": 1, "to": 0, "reason": "Idle"}.items()
        # The first held request wakes it.
        made.demand = {"held": 1, "held_since_s": 0.1, "running": 0, "last_request_age_s": 0.1}
        (first,) = made.wait_replicas(1)
        made.demand = {"held": 0, "running": 12, "last_request_age_s": 0.1}
        # It grows as far as its load asks for.
        made.replicas[first].running = 12
        names = made.wait_replicas(3)
        made.demand = {"held": 0, "running": 3, "last_request_age_s": 0.1}
        # Fewer requests: the replica with the most of them is the one that stays.
        made.replicas[names[0]].running, made.replicas[names[1]].running, made.replicas[names[2]].running = 0, 2, 1
        assert made.wait_replicas(1) == [names[1]]
        wait(lambda: "ScaledDown" in event_reasons(api_cluster, NAME, namespace))
        happened = [item for item in event_reasons(api_cluster, NAME, namespace) if item.startswith(("Scaled", "Woke"))]
        # In one step or two: the mean of the load falls for longer than this service's downAfter.
        assert happened[:3] == ["ScaledToZero", "WokeUp", "ScaledUp"] and set(happened[3:]) == {"ScaledDown"}


async def test_what_was_decided_for_a_spec_that_has_changed_is_not_written(api_cluster: ApiCluster, namespace: str) -> None:
    """Between a change of `scaling.controller` and the reconcile that tells of it, the loop still knows the former owner's policy."""
    install_crd(api_cluster)
    apply(api_cluster, service(NAME, namespace, scaling={"max": 3}))
    live = get(api_cluster, "inferenceservices", NAME, namespace)["metadata"]
    client, targets = await connect(str(api_cluster.kubeconfig)), Targets()
    loop = Autoscaler(client, SETTINGS, targets, enqueue=lambda namespace, name: None, scaled=lambda direction: None)
    known = Target(
        namespace=namespace, name=NAME, uid=live["uid"], revision="", policy=Policy(min=2, max=3), current=1, generation=live["generation"]
    )
    replicas = lambda: get(api_cluster, "inferenceservices", NAME, namespace)["spec"]["replicas"]
    try:
        async with loop._scraper:
            targets.note(known.key, known)
            patch(api_cluster, NAME, namespace, {"scaling": {"controller": "HPA"}})
            await loop.look()
            assert replicas() == 1, "HPA owns it now"
            targets.note(known.key, replace(known, generation=live["generation"] + 1))
            await loop.look()
            assert replicas() == 2
    finally:
        await client.close()


def test_unknown_load_holds_replicas_and_says_so(api_cluster: ApiCluster, namespace: str) -> None:
    with world(api_cluster, namespace) as made, scaling(made) as operator:
        # As long as only one of the two is ready, its load is all there is, and asks for no second one.
        elastic = {"min": 2, "max": 4, "metric": "inflight", "target": 4, **QUICK}
        apply(api_cluster, service(NAME, namespace, replicas=2, scaling=elastic))
        made.busy = 4
        names = made.wait_replicas(2)
        wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
        patch(api_cluster, NAME, namespace, {"scaling": {"min": 1}})
        wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
        # One replica says nothing any more, and then all load of the other is gone.
        made.replicas[names[0]].silent = True
        held = wait_reason(api_cluster, NAME, namespace, "MetricsUnknown", "ScalingReady")
        assert held["status"] == "False" and "held as they are" in held["message"]
        before = versions(api_cluster, namespace)
        writes = len(operator.writes)
        made.replicas[names[1]].running = 0
        time.sleep(1.0)  # several looks
        assert versions(api_cluster, namespace) == before and made.replicas_wanted() == 2
        # It answers again: now it is known that nobody asks.
        made.replicas[names[0]].silent, made.replicas[names[0]].running = False, 0
        made.wait_replicas(1)
        wait_reason(api_cluster, NAME, namespace, "ScalingActive", "ScalingReady")
        assert any("/scale" in path for _, path in operator.writes[writes:])
        assert owners_of_replicas(api_cluster, namespace) == ["gantline-autoscaler"]
        # Without a gateway nothing could wake it, so it does not sleep.
        patch(api_cluster, NAME, namespace, {"scaling": {"min": 0}})
        wait_reason(api_cluster, NAME, namespace, "GatewayMissing", "ScalingReady")
        assert made.replicas_wanted() == 1
        # What the spec bounds needs no load: and a paused service is left alone.
        api_cluster.kubectl("annotate", "gisvc", NAME, "-n", namespace, "gantline.io/paused=true")
        wait_reason(api_cluster, NAME, namespace, "Paused", "Progressing")
        patch(api_cluster, NAME, namespace, {"scaling": {"min": 3}})
        seen = get(api_cluster, "inferenceservices", NAME, namespace)["metadata"]["generation"]
        wait(lambda: status(api_cluster, NAME, namespace)["observedGeneration"] == seen)
        assert made.replicas_wanted() == 1
        api_cluster.kubectl("annotate", "gisvc", NAME, "-n", namespace, "gantline.io/paused-")
        made.wait_replicas(3)
        assert len(server_pods(api_cluster, NAME, namespace)) >= 3 and reason(api_cluster, NAME, namespace) != ""
