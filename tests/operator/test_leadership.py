"""Several operators, of which one works: real processes on a real API server, killed, stopped past their Lease and continued."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_devcluster.client import ApiError
from gantline_operator.autoscaling.loop import Autoscaler
from gantline_operator.client import Fenced, NotFound, connect
from gantline_operator.leadership import LEASES, Leadership, LeadershipLost
from gantline_operator.observe import CONFIG_MAPS

from tests.operator.harness import (
    SETTINGS,
    TINY,
    Operator,
    apply,
    children,
    fates,
    inspected,
    install_crd,
    items,
    service,
    wait,
    wait_reason,
)

FULL = os.environ.get("GANTLINE_FULL_MATRIX") == "1"
LEASE_S = 15 if FULL else 4
SERVICES = 20 if FULL else 2


class Process:
    """`gantline-operator`, as the chart starts it."""

    def __init__(self, cluster: ApiCluster, namespace: str, log: Path, pod: str) -> None:
        self.pod = pod
        self.attended = True
        """Whether it is started anew when it has lost its Lease."""
        self.restarted = 0
        self._health, self._log = free_port(), log
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GANTLINE_")},
            "KUBECONFIG": str(cluster.kubeconfig),
            "GANTLINE_WATCH_NAMESPACES": namespace,
            "GANTLINE_IMAGE_CPU": SETTINGS.image_cpu,
            "GANTLINE_LEASE": f"{namespace}/gantline",
            "GANTLINE_LEASE_SECONDS": str(LEASE_S),
            "GANTLINE_IDENTITY": pod,
            "GANTLINE_METRICS_PORT": "0",
            "GANTLINE_HEALTH_PORT": str(self._health),
            "GANTLINE_LISTEN_ADDRESS": "127.0.0.1",
        }
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("a") as out:
            return subprocess.Popen([sys.executable, "-m", "gantline_operator.main"], env=self._environment, stderr=out)

    def start_anew(self) -> None:
        """If it has ended because its Lease was over, as it does where the API server or the machine stands still for 2.7 s of 4."""
        if self.attended and self.process.poll() == 1:
            self.restarted += 1
            self.process = self._start()

    def log(self) -> str:
        return self._log.read_text()

    def leads(self) -> bool | None:
        """None where it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}/healthz", timeout=5) as answer:
                return bool(json.load(answer)["leader"])
        except OSError:
            return None


@contextmanager
def kubelet() -> Iterator[list[Process]]:
    """A list to fill with processes that are started anew when they lose their Lease; all are killed at the end."""
    running: list[Process] = []
    stopping = threading.Event()

    def keep() -> None:
        while not stopping.wait(0.2):
            for one in list(running):
                one.start_anew()

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield running
    finally:
        stopping.set()
        thread.join()
        for one in running:
            one.process.kill()
            one.process.wait()


def test_a_second_operator_takes_over_from_one_that_is_stopped_and_is_continued_itself_when_it_is_killed(
    api_cluster: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    """The first goes on past its Lease, with a child to repair and nobody else alive: it must not write."""
    cluster = api_cluster
    install_crd(cluster)
    names = [f"led-{number}" for number in range(SERVICES)]
    fates(cluster, inspected(**dict.fromkeys(names, TINY)))
    if not cluster.client.get("/api/v1/nodes").get("items"):
        cluster.simulate("cpu", 1)
    with kubelet() as running:

        def start(pod: str) -> Process:
            running.append(Process(cluster, namespace, tmp_path / f"{len(running)}.log", pod))
            return running[-1]

        first, second = start("a"), start("b")
        wait(lambda: roles(first, second), what=lambda: (first.log(), second.log()))
        apply(cluster, *(service(name, namespace) for name in names))
        wait(lambda: items(cluster, "jobs", namespace))
        leader, other = wait(lambda: roles(first, second), what=lambda: (first.log(), second.log()))
        leader.attended = False
        leader.process.send_signal(signal.SIGSTOP)
        robbed_s = wait_taken_over(cluster, namespace, leader, other)
        print(f"taken over {robbed_s:.1f} s after the leader's last renewal")
        assert robbed_s >= LEASE_S, "a holder that renews is not robbed"
        for name in names:
            wait_reason(cluster, name, namespace, "Ready")
        other.process.kill()
        cluster.kubectl("delete", "deployment", names[0], "-n", namespace)
        leader.process.send_signal(signal.SIGCONT)
        assert leader.process.wait(30) == 1, leader.log()
        assert "to be started anew and wait" in leader.log()
        assert f"deployments/{names[0]}" not in children(cluster, namespace, "deployments"), "it wrote although its Lease was over"

        third = start("c" if FULL else other.pod)  # as another pod, or as the killed one's next container, which need not wait
        wait(third.leads, what=third.log)
        for name in names:
            wait_reason(cluster, name, namespace, "Ready")
        wait(lambda: f"deployments/{names[0]}" in children(cluster, namespace, "deployments"))
        assert len(items(cluster, "jobs", namespace)) == SERVICES, "one inspection for each service, whoever made it"
        fourth = start("d") if FULL else None
        if fourth is not None:
            measure_an_orderly_end(third, fourth)
        else:
            third.process.terminate()
        assert third.process.wait(30) == 0, third.log()
        if fourth is not None:
            fourth.process.terminate()
            assert fourth.process.wait(30) == 0
        lease = lease_of(cluster, namespace)
        assert not lease.get("holderIdentity")
        assert lease["leaseTransitions"] == (3 if FULL else 1) or any(one.restarted for one in (first, second, third))


def roles(*operators: Process) -> tuple[Process, Process] | None:
    """Which of two leads, and which waits; None while that is not decided."""
    states = {one.leads(): one for one in operators}
    return (states[True], states[False]) if set(states) == {True, False} else None


def wait_taken_over(cluster: ApiCluster, namespace: str, stopped: Process, other: Process) -> float:
    """Seconds from the last renewal of the one to the other's leading, by the times that they wrote themselves."""
    renewed: list[str] = []

    def taken() -> float | None:
        lease = lease_of(cluster, namespace)
        if lease["holderIdentity"] == stopped.pod:
            renewed.append(lease["renewTime"])
            return None
        return (datetime.fromisoformat(lease["acquireTime"]) - datetime.fromisoformat(renewed[-1])).total_seconds()

    seconds: float = wait(taken, what=other.log)
    wait(other.leads, what=other.log)
    return seconds


def measure_an_orderly_end(leader: Process, waiting: Process) -> None:
    wait(lambda: waiting.leads() is False)
    ended = time.monotonic()
    leader.process.terminate()
    wait(waiting.leads)
    print(f"taken over {time.monotonic() - ended:.1f} s after the leader was told to end")


async def test_a_lease_that_is_given_back_is_taken_at_once_and_one_that_is_taken_away_is_noticed(
    api_cluster: ApiCluster, namespace: str
) -> None:
    client = await connect(str(api_cluster.kubeconfig))
    lease = f"{namespace}/gantline"
    stop = asyncio.Event()
    one, two = (Leadership(client, lease, name, 30.0) for name in ("one", "two"))
    two._retry_s = 0.1
    assert await one.acquire(stop)
    waiting = asyncio.create_task(two.acquire(stop))
    await asyncio.sleep(0.3)
    assert not two.leads()
    again = Leadership(client, lease, "one", 30.0)
    assert await again.acquire(stop), "a container that is started anew goes on under its pod's name"
    await again.release()
    assert await asyncio.wait_for(waiting, 60) and two.leads()

    one._retry_s = 0.1
    with pytest.raises(LeadershipLost, match="is held by two"):
        await one.keep()
    assert not one.leads()
    stop.set()
    assert not await one.acquire(stop)
    assert (await client.get(LEASES, namespace, "gantline"))["spec"]["holderIdentity"] == "two"
    for leadership in (one, two):
        await leadership.release()
    await client.close()


async def test_a_lease_is_given_back_although_a_renewal_that_was_given_up_has_arrived(api_cluster: ApiCluster, namespace: str) -> None:
    client = await connect(str(api_cluster.kubeconfig))
    one = Leadership(client, f"{namespace}/gantline", "one", 30.0)
    assert await one.acquire(asyncio.Event())
    await client.patch(LEASES, namespace, "gantline", {"spec": {"renewTime": "2026-11-27T10:11:42.797783Z"}})
    await one.release()
    assert holder(api_cluster, namespace) == ""
    await client.close()


def test_an_operator_that_waits_passes_on_what_only_the_leader_knows(
    api_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's load, for KEDA; and connections to the custom metrics API, whatever is said in them."""
    install_crd(api_cluster)
    known = "127.0.0.1"
    knowing: list[Autoscaler] = []

    def only_the_first(asked: Autoscaler, key: str) -> float | None:
        knowing.append(asked)
        return 2.5 if asked is knowing[0] else None

    monkeypatch.setattr(Autoscaler, "load", only_the_first)
    metrics, custom = free_port(), free_port()
    settings = replace(SETTINGS, watch_namespaces=(namespace,), lease=f"{namespace}/gantline", metrics_port=metrics)

    def load(address: str) -> str:
        try:
            with urllib.request.urlopen(f"http://{address}:{metrics}/load/{namespace}/chat", timeout=60) as answer:
                return str(json.load(answer)["load"])
        except OSError as error:
            return str(error)

    second = replace(settings, identity="second", address="127.0.0.2", listen_address="127.0.0.2", custom_metrics_port=custom)
    with Operator(api_cluster, replace(settings, identity="first", address=known)):
        wait(lambda: load(known) == "2.5")
        # Its port answers before it leads, and the Lease is whoever's asks first.
        wait(lambda: holder(api_cluster, namespace) == "first", what=lambda: holder(api_cluster, namespace))
        with Operator(api_cluster, second):
            wait(lambda: load("127.0.0.2") == "2.5", what=lambda: (load("127.0.0.2"), holder(api_cluster, namespace)))
            with socket.create_server((known, custom)) as leader, socket.create_connection(("127.0.0.2", custom), timeout=60) as asking:
                leader.settimeout(60)
                asking.sendall(b"hello")
                answering, _ = leader.accept()
                with answering:
                    assert answering.recv(5) == b"hello"
                    answering.sendall(b"who is there")
                assert asking.recv(20) == b"who is there" and asking.recv(1) == b"", "an end is passed on, too"


def lease_of(cluster: ApiCluster, namespace: str) -> Any:
    return cluster.client.get(f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/gantline")["spec"]


def holder(cluster: ApiCluster, namespace: str) -> str:
    """Of the Lease; empty where there is none yet."""
    try:
        lease = lease_of(cluster, namespace)
    except ApiError as error:
        if error.status != 404:
            raise
        return ""
    return str(lease.get("holderIdentity") or "")


async def test_what_is_fenced_is_not_sent(api_cluster: ApiCluster, namespace: str) -> None:
    client = await connect(str(api_cluster.kubeconfig))
    client.fence(lambda: 0.0)
    with pytest.raises(Fenced, match="no longer leads"):
        await client.create(CONFIG_MAPS, namespace, {"metadata": {"name": "late"}})
    with pytest.raises(NotFound):
        await client.get(CONFIG_MAPS, namespace, "late")
    assert await client.list(CONFIG_MAPS, namespace) is not None
    await client.close()
