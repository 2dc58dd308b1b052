"""What the autoscaler asks: replicas that say how busy they are, and a gateway that says what it holds, as real HTTP servers on loopback.

Simulated pods have no network. Their addresses in the API server are set to loopback addresses at which these servers listen.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError

from tests.operator.harness import TINY, Operator, fates, inspected, install_crd, items, server_pods, serving, wait

Object = dict[str, Any]
SERVER_PORT = 8000
GATEWAY = {"app.kubernetes.io/component": "gateway", "app.kubernetes.io/part-of": "gantline"}
NAME = "elastic"
QUICK = {"downAfter": "1s", "zeroAfter": "1s"}


@contextmanager
def answering(address: str, port: int, answer: Callable[[str], str | None]) -> Iterator[int]:
    """A server on loopback; `answer` gets the path, None is a 503. Yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = answer(self.path)
            body = (text or "").encode()
            self.send_response(200 if text is not None else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((address, port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class FakeReplica:
    """What one server would say at /metrics."""

    running: int = 0
    waiting: int = 0
    usage: float = 0.0
    served: int = 0
    silent: bool = False

    def answer(self, path: str) -> str | None:
        if self.silent or path != "/metrics":
            return None
        return (
            "# HELP gantline_num_requests_running Requests that the engine computes now.\n"
            f"gantline_num_requests_running {self.running}.0\ngantline_num_requests_waiting {self.waiting}.0\n"
            f"gantline_kv_cache_usage_perc {self.usage}\ngantline_prompt_tokens_total {self.served}.0\n"
        )


@dataclass
class World:
    """Replicas of one service by their pods' names, and one gateway."""

    cluster: ApiCluster
    namespace: str
    service: str
    gateway_port: int = 0
    busy: int = 0
    """Requests that a replica runs from the beginning."""
    demand: Object = field(default_factory=dict)
    """What the gateway says of the service."""
    replicas: dict[str, FakeReplica] = field(default_factory=dict)
    _network: str = field(default_factory=lambda: f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}")
    _exits: list[Any] = field(default_factory=list)

    def adopt(self) -> list[str]:
        """Gives every pod that is ready an address at which a replica answers; the names of the service's pods that are not ending."""
        pods = [pod for pod in server_pods(self.cluster, self.service, self.namespace) if "deletionTimestamp" not in pod["metadata"]]
        for pod in pods:
            name = pod["metadata"]["name"]
            if name not in self.replicas and is_ready(pod):
                self.replicas[name] = FakeReplica(running=self.busy)
                address = f"{self._network}.{len(self.replicas)}"
                self._serve(address, SERVER_PORT, self.replicas[name].answer)
                set_address(self.cluster, self.namespace, name, address)
        return sorted(pod["metadata"]["name"] for pod in pods)

    def replicas_wanted(self) -> int:
        self.adopt()
        found = [item for item in items(self.cluster, "inferenceservices", self.namespace) if item["metadata"]["name"] == self.service]
        return int(found[0]["spec"]["replicas"])

    def wait_replicas(self, count: int, *, timeout_s: float = 60.0) -> list[str]:
        """Until the service has this many pods, all with an address; their names."""

        def check() -> list[str] | None:
            names = self.adopt()
            there = self.replicas_wanted() == count and len(names) == count and set(names) <= set(self.replicas)
            return [*names, ""] if there else None

        found: list[str] = wait(check, timeout_s=timeout_s, what=lambda: (self.replicas_wanted(), self.adopt()))
        return found[:-1]

    def start_gateway(self) -> None:
        self.gateway_port = self._serve("127.0.0.1", 0, self._say)
        containers = [{"name": "gateway", "image": "registry.example/gateway:test"}]
        body = {
            "metadata": {"name": "gateway", "labels": GATEWAY},
            "spec": {"containers": containers, "tolerations": [{"operator": "Exists"}]},
        }
        self.cluster.client.post(f"/api/v1/namespaces/{self.namespace}/pods", body)
        path = f"/api/v1/namespaces/{self.namespace}/pods/gateway"
        wait(lambda: is_ready(self.cluster.client.get(path)))
        set_address(self.cluster, self.namespace, "gateway", "127.0.0.1")

    def _say(self, path: str) -> str | None:
        nothing = {"held": 0, "held_since_s": 0.0, "running": 0, "last_request_age_s": None}
        return json.dumps({"services": {f"{self.namespace}/{self.service}": {**nothing, **self.demand}}})

    def _serve(self, address: str, port: int, answer: Callable[[str], str | None]) -> int:
        server = answering(address, port, answer)
        self._exits.append(server)
        return server.__enter__()

    def close(self) -> None:
        for server in self._exits:
            server.__exit__(None, None, None)


def is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def set_address(cluster: ApiCluster, namespace: str, pod: str, address: str) -> None:
    body = {"status": {"podIP": address, "podIPs": [{"ip": address}]}}
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/status"
    try:
        cluster.client.call("PATCH", path, body, content_type="application/merge-patch+json")
    except ApiError as error:
        if error.status != 404:  # it was scaled away meanwhile
            raise


@contextmanager
def world(cluster: ApiCluster, namespace: str, *, gateway: bool = False) -> Iterator[World]:
    install_crd(cluster)
    fates(cluster, inspected(**{NAME: TINY}))
    if not cluster.client.get("/api/v1/nodes").get("items"):
        cluster.simulate("cpu", 1)
    made = World(cluster, namespace, NAME)
    try:
        if gateway:
            made.start_gateway()
        yield made
    finally:
        made.close()


@contextmanager
def scaling(made: World, **changes: Any) -> Iterator[Operator]:
    """An operator that looks four times a second."""
    settings = {"demand_namespace": made.namespace, "demand_port": made.gateway_port or 1, "scaling_interval_seconds": 0.25, **changes}
    with serving(made.cluster, made.namespace, **settings) as operator:
        yield operator


def owners_of_replicas(cluster: ApiCluster, namespace: str) -> list[str]:
    found = json.loads(cluster.kubectl("get", "gisvc", NAME, "-n", namespace, "-o", "json", "--show-managed-fields").stdout)
    entries = found["metadata"]["managedFields"]
    return [entry["manager"] for entry in entries if "f:replicas" in entry["fieldsV1"].get("f:spec", {})]
