"""An operator that is killed between any two writes of creating, updating, quantizing, rolling out and deleting: the next one finishes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from gantline_devcluster.api_only import ApiCluster

from tests.operator.definition import every_kind
from tests.operator.harness import SETTINGS, TINY, Operator, apply, copied, fates, inspected, install_crd, service, volume, wait_reason
from tests.operator.killing import FULL, SCENARIOS, Run, reconcile_until_killed, runs
from tests.operator.oracle import assert_at_rest, assert_gone

AT_ONCE = 12


@pytest.fixture(scope="module")
def cluster(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    install_crd(api_cluster)
    fates(api_cluster, [*inspected(tiny=TINY, packed=TINY), ("quantize", "packed", "complete", copied(), {})])
    if not any(node["metadata"]["name"] == "cpu-0" for node in api_cluster.client.get("/api/v1/nodes").get("items") or []):
        api_cluster.simulate("cpu", 1)
    with every_kind(api_cluster):
        yield api_cluster


async def test_an_operator_killed_between_any_two_writes_leaves_a_state_that_the_next_one_finishes(
    cluster: ApiCluster, namespace: str
) -> None:
    todo, done = list(runs(namespace)), dict[tuple[str, int], int]()
    for first in range(0, len(todo), AT_ONCE):
        some = todo[first : first + AT_ONCE]
        await asyncio.to_thread(_prepare, cluster, some)
        counts = await asyncio.gather(*(reconcile_until_killed(cluster.kubeconfig, run) for run in some))
        done |= {(run.scenario.name, run.writes): count for run, count in zip(some, counts, strict=True)}
        await asyncio.to_thread(_finish, cluster, some)
    if FULL:
        print("writes until ready:", {name: done[name, most] for name, most in ((s.name, s.most_writes) for s in SCENARIOS)})
        assert all(done[scenario.name, scenario.most_writes] < scenario.most_writes for scenario in SCENARIOS), "some places were left out"
    assert sum(count == writes for (_, writes), count in done.items()) >= len(done) // 2, "hardly any operator was killed"


def _prepare(cluster: ApiCluster, some: Sequence[Run]) -> None:
    """Every service at rest before its change, then all changes at once."""
    for run in some:
        cluster.client.post("/api/v1/namespaces", {"metadata": {"name": run.namespace}})
        volume(cluster, run.namespace, f"{run.scenario.service}-cache")
    there = [run for run in some if run.scenario.before is not None]
    if there:
        apply(cluster, *(service(run.scenario.service, run.namespace, **(run.scenario.before or {})) for run in there))
        with Operator(cluster, replace(SETTINGS, watch_namespaces=tuple(run.namespace for run in there))):
            for run in there:
                wait_reason(cluster, run.scenario.service, run.namespace, "Ready")
    apply(cluster, *(service(run.scenario.service, run.namespace, **(run.scenario.after or {})) for run in some))


def _finish(cluster: ApiCluster, some: Sequence[Run]) -> None:
    deleted = [run for run in some if run.scenario.after is None]
    for run in deleted:
        cluster.kubectl("delete", "gisvc", run.scenario.service, "-n", run.namespace, "--wait=false")
    with Operator(cluster, replace(SETTINGS, watch_namespaces=tuple(run.namespace for run in some))):
        kept = [run.namespace for run in some if run.scenario.after is not None]
        for run in some:
            if run.namespace in kept:
                wait_reason(cluster, run.scenario.service, run.namespace, "Ready")
        assert_at_rest(cluster, *kept)
        assert_gone(cluster, *(run.namespace for run in deleted))
    for run in some:
        cluster.client.call("DELETE", f"/api/v1/namespaces/{run.namespace}")
