"""A control plane without a node: a real API server in seconds, without root. Most of the suite talks to one of these.

    with ApiCluster(kwok=True) as cluster:
        cluster.simulate("h100", count=4)
        cluster.kubectl("apply", "-f", "-", input=manifest)

Everything listens on 127.0.0.1 or on unix sockets in a folder of its own, and ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gantline_devcluster import profiles
from gantline_devcluster.binaries import find
from gantline_devcluster.client import ApiError, Client
from gantline_devcluster.control_plane import ControlPlane
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.fates import FatePolicies
from gantline_devcluster.processes import Component, Keeper, tail

PORTS = range(
    20_000, 32_000
)  # below the kernel's ephemeral ports, so that no outgoing connection takes one between the choice and the bind
START_TIMEOUT_S = 90.0
START_ATTEMPTS = 3
LEASE_S = 200
# Simulated and hand-made nodes stay as they are: tests set a node's condition themselves, no clock does.
NO_ENDPOINT = "--endpoint-reconciler-type=none"  # a loopback address may be no Service's endpoint
GARBAGE = {"GOGC": "400"}  # collect at five times what is in use instead of twice: an eighth less to compute, 200 MB more memory
NODE_GRACE = "--node-monitor-grace-period=24h"
HPA_SYNC = "--horizontal-pod-autoscaler-sync-period=1s"  # nothing where there is none; 15 s by default, which is long for a test


class ApiCluster:
    """etcd and kube-apiserver, with the controllers, the scheduler (default: where kwok is wanted) and kwok as asked. RBAC is on.

    `oldest` (default: whether GANTLINE_KUBERNETES is `oldest`) runs the oldest release that upstream supports.
    """

    def __init__(self, *, controllers: bool = True, scheduler: bool | None = None, kwok: bool = False, oldest: bool | None = None) -> None:
        self._controllers = controllers
        self._scheduler = kwok if scheduler is None else scheduler
        self._kwok = kwok
        self._oldest = os.environ.get("GANTLINE_KUBERNETES") == "oldest" if oldest is None else oldest
        self._keeper: Keeper | None = None

    def __enter__(self) -> ApiCluster:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> ApiCluster:
        """Start everything; returns when the API server is ready and, with controllers, pods can be created in `default`.

        Raises DevclusterError.
        """
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start_once()
                return self
            except DevclusterError as error:
                self.stop()
                if attempt == START_ATTEMPTS or "address already in use" not in str(error):
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("the loop above returns or raises")

    def _start_once(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gantline-api-", dir="/tmp"))  # short: unix sockets have at most 107 bytes of path
        self._keeper = Keeper(remove_at_end=self.folder)
        self.plane = ControlPlane(self.folder, "127.0.0.1", free_port(), oldest=self._oldest)
        self.plane.prepare()
        self.run(self.plane.etcd())
        self.run(self.plane.apiserver(NO_ENDPOINT))
        self.client = Client(self.kubeconfig)
        self.client.wait_ready(START_TIMEOUT_S, self._check_components)
        if self._controllers:
            self.run(self.plane.controller_manager(NODE_GRACE, HPA_SYNC))
        if self._scheduler:
            self.run(self.plane.scheduler())
        if self._kwok:
            self.run(self.plane.kwok(LEASE_S))
        self.fates = FatePolicies(self.client)
        if self._controllers:
            self._wait_for_default_account()

    def stop(self) -> None:
        """End every process and remove the folder; nothing is left. Safe to call twice."""
        if self._keeper:
            with contextlib.suppress(AttributeError):
                self.client.close()
            self._keeper.close()
            self._keeper = None
            shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.plane.admin_kubeconfig

    @property
    def url(self) -> str:
        return self.plane.url

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each running component."""
        assert self._keeper, "the cluster is not started"
        return {name: state.pid for name, state in self._keeper.states.items() if state.pid}

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator. With `check`, raises DevclusterError with kubectl's own words where it fails."""
        return run_kubectl(self.kubeconfig, *arguments, input=input, check=check, timeout_s=timeout_s)

    def simulate(self, profile: str | Path, count: int | None = None, *, tainted: bool = False) -> list[str]:
        """Add the nodes of a profile (see `profiles`); returns their names. Without kwok they stay Ready, but no pod ever runs on them."""
        return add_nodes(self.client, profiles.load(profile, count, tainted=tainted))

    def remove_nodes(self, *names: str) -> None:
        """Remove these nodes, or every simulated one, and at once what was bound to them.

        Their Leases go with them: of one that the garbage collector takes later, when a node of the same name is there again, kwok learns
        only when it would renew it, a quarter of `LEASE_S` later, and until then leaves that node's pods alone.
        """
        for name in names or tuple(n["metadata"]["name"] for n in self.client.get("/api/v1/nodes?labelSelector=type%3Dkwok")["items"]):
            for path in (f"/api/v1/nodes/{name}", f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}"):
                with contextlib.suppress(ApiError):
                    self.client.call("DELETE", path)

    def set_fate(self, labels: dict[str, str], fate: str, **details: Any) -> None:
        """Give pods with these labels a fate from now on (see `stages` and `fates.FatePolicies.set`)."""
        self.fates.set(labels, fate, **details)

    def clear_fates(self) -> None:
        self.fates.clear()

    def run(self, component: Component) -> None:
        """Start a component, or one of another product beside ours; it ends with the cluster."""
        assert self._keeper, "the cluster is not started"
        self._keeper.start(replace(component, environment={**GARBAGE, **component.environment}))

    def service_account_kubeconfig(self, namespace: str, name: str, *, hours: int = 24) -> Path:
        """A kubeconfig that acts as this ServiceAccount, by a token from the API server. The account must exist. Raises ApiError."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": hours * 3600}}
        token = self.client.post(path, body)["status"]["token"]
        return self.plane.write_kubeconfig(self.folder / f"sa-{namespace}-{name}.kubeconfig", token, name, namespace=namespace)

    def stop_apiserver(self) -> None:
        """An outage: the API server dies at once, without a word to anybody. etcd keeps the data."""
        assert self._keeper, "the cluster is not started"
        self._keeper.stop("kube-apiserver", signal.SIGKILL)

    def start_apiserver(self) -> None:
        """End the outage; returns when the API server is ready. Idempotent."""
        if "kube-apiserver" not in self.pids:
            self.run(self.plane.apiserver(NO_ENDPOINT))
        self.client.wait_ready(START_TIMEOUT_S, self._check_components)

    def _check_components(self) -> None:
        assert self._keeper, "the cluster is not started"
        for name, state in self._keeper.states.items():
            if state.failed:
                log = self.folder / "logs" / f"{name}.log"
                raise DevclusterError(f"{name} ended with code {state.code}: {tail(log)}", "The message above is its own")

    def _wait_for_default_account(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(ApiError):
                self.client.get("/api/v1/namespaces/default/serviceaccounts/default")
                return
            self._check_components()
            if time.monotonic() > deadline:
                raise DevclusterError("the controllers made no ServiceAccount in time", "Look into kube-controller-manager's log")
            time.sleep(0.05)


def add_nodes(client: Client, nodes: list[profiles.Node]) -> list[str]:
    """Create these nodes with their status; those that exist become like them, and keep their pods. Returns their names."""
    for node in nodes:
        try:
            client.post("/api/v1/nodes", node)
        except ApiError as error:
            if error.status != 409:
                raise
            _make_like(client, node)
    return [node["metadata"]["name"] for node in nodes]


def _make_like(client: Client, node: profiles.Node) -> None:
    """Not deleted and created again: kwok would mistake the new one's Lease for the old one's (see `remove_nodes`)."""
    path = f"/api/v1/nodes/{node['metadata']['name']}"
    for subresource, parts in (("", ("spec",)), ("/status", ("status",))):
        for tries_left in reversed(range(5)):  # kwok and the node's controllers write too
            found = client.get(path)
            metadata = {**found["metadata"], **{part: node["metadata"].get(part) or {} for part in ("labels", "annotations")}}
            try:
                client.call("PUT", path + subresource, {**found, "metadata": metadata, **{part: node.get(part) or {} for part in parts}})
                break
            except ApiError as error:
                if error.status != 409 or not tries_left:
                    raise


def run_kubectl(
    kubeconfig: Path, *arguments: str, input: str | None = None, check: bool = True, timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    command = [str(find("kubectl")), *arguments]
    answer = subprocess.run(command, env=environment, input=input, capture_output=True, text=True, timeout=timeout_s)
    if check and answer.returncode:
        raise DevclusterError(f"kubectl {' '.join(arguments)} failed: {answer.stderr.strip()}", "The message is kubectl's")
    return answer


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise DevclusterError("no free loopback port was found", f"Free one of {PORTS.start} to {PORTS.stop - 1}")
