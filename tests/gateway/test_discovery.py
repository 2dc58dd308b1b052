"""The catalog follows a real API server: objects made, changed and removed, also while nobody could be asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import yaml
from gantline_devcluster.api_only import ApiCluster
from gantline_gateway.catalog import Catalog, Service
from gantline_gateway.cluster_api import Expired, connect
from gantline_gateway.cluster_objects import ENDPOINTS, SERVICES
from gantline_gateway.directory import Directory
from gantline_gateway.discovery import Discovery

from tests.gateway.gateway_process import GatewayProcess
from tests.operator.applying import apply
from tests.operator.definition import wait_until_served
from tests.runtime.server_process import wait_until

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]


@pytest.fixture(scope="module")
def defined(api_cluster: ApiCluster) -> ApiCluster:
    apply(api_cluster.client, yaml.safe_load((ROOT / "crds/gantline.io_inferenceservices.yaml").read_text()))
    wait_until_served(api_cluster)
    return api_cluster


class Relay:
    """Passes connections on to the API server, until it is `cut`."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self._config = json.loads(kubeconfig.read_text())
        self._address = urlsplit(self._config["clusters"][0]["cluster"]["server"])
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.kubeconfig = folder / "kubeconfig"
        self._port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self._config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{self._port}"
        self.kubeconfig.write_text(json.dumps(self._config))

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._address.hostname, self._address.port)
        self._writers |= {writer, back}
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def discovering(kubeconfig: Path, namespace: str) -> AsyncIterator[Directory]:
    api, directory = await connect(str(kubeconfig)), Directory()
    task = asyncio.create_task(Discovery(api, directory, [namespace]).run())
    try:
        yield directory
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.close()


async def until(directory: Directory, condition: Callable[[Catalog], bool], timeout_s: float = 30.0) -> Catalog:
    async with asyncio.timeout(timeout_s):
        while not condition(directory.catalog):
            await directory.wait_change(0, 1.0)
    return directory.catalog


def service(namespace: str, name: str, **spec: Any) -> Object:
    meta = {"name": name, "namespace": namespace}
    return {
        "apiVersion": "gantline.io/v1alpha1",
        "kind": "InferenceService",
        "metadata": meta,
        "spec": {"model": {"uri": "file:///model"}, **spec},
    }


def endpoint_slice(namespace: str, name: str, suffix: str = "x", **ready: bool) -> Object:
    """For each pod whether it is ready; the address comes from its place in the list."""
    labels = {"kubernetes.io/service-name": name, "gantline.io/role": "server"}
    endpoints = [
        {
            "addresses": [f"10.1.2.{place}"],
            "conditions": {"ready": value, "serving": value, "terminating": False},
            "targetRef": {"kind": "Pod", "name": pod},
        }
        for place, (pod, value) in enumerate(ready.items(), 1)
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-{suffix}", "namespace": namespace, "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
        "endpoints": endpoints,
    }


def pods(item: Service) -> list[str]:
    return [replica.identity for replica in item.usable]


def delete(cluster: ApiCluster, namespace: str, name: str) -> None:
    cluster.client.call("DELETE", f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices/{name}")


async def test_services_and_replicas_are_followed_as_they_come_change_and_go(defined: ApiCluster, namespace: str) -> None:
    client = defined.client
    apply(client, service(namespace, "first", model={"uri": "file:///model", "servedName": "org/first"}, replicas=2))
    async with discovering(defined.kubeconfig, namespace) as directory:
        catalog = await until(directory, lambda catalog: len(catalog.services) == 1)
        first = catalog.resolve("org/first")
        assert (first.key, first.wanted, first.usable, first.suspended) == (f"{namespace}/first", 2, (), False)
        assert first.created > 0

        apply(client, endpoint_slice(namespace, "first", one=True, two=False))
        catalog = await until(directory, lambda catalog: bool(catalog.services[0].usable))
        assert [(replica.identity, replica.url) for replica in catalog.services[0].usable] == [("one", "http://10.1.2.1:8000")]
        assert len(catalog.services[0].replicas) == 2

        apply(client, service(namespace, "second", suspend=True))
        ready = {"type": "Ready", "status": "False", "reason": "WaitingForCapacity", "lastTransitionTime": "2026-11-26T00:00:00Z"}
        status = {"startup": {"total": "1m30s"}, "plan": {"sessionLen": 4096, "loadSeconds": 20}, "conditions": [ready]}
        path = f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices/second/status"
        client.call("PATCH", path, {"status": status}, content_type="application/merge-patch+json")
        catalog = await until(directory, lambda catalog: any(item.session_len for item in catalog.services))
        second = catalog.resolve("second")
        assert (second.suspended, second.startup_s, second.session_len, second.trouble) == (True, 90.0, 4096, "WaitingForCapacity")

        delete(defined, namespace, "first")
        await until(directory, lambda catalog: [item.name for item in catalog.services] == ["second"])


async def test_what_was_known_stays_while_the_api_server_is_away_and_ghosts_go_when_it_is_back(
    defined: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    client, relay = defined.client, Relay(defined.kubeconfig, tmp_path)
    for name in ("ghost", "stays"):
        apply(client, service(namespace, name))
        apply(client, endpoint_slice(namespace, name, old=True))
    await relay.open()
    async with discovering(relay.kubeconfig, namespace) as directory:
        before = await until(directory, lambda catalog: len(catalog.services) == 2 and all(item.usable for item in catalog.services))
        await relay.cut()
        delete(defined, namespace, "ghost")
        apply(client, endpoint_slice(namespace, "stays", new=True))
        assert directory.catalog is before
        await relay.open()
        catalog = await until(directory, lambda catalog: [pods(item) for item in catalog.services] == [["new"]])
        assert [item.name for item in catalog.services] == ["stays"]
    await relay.cut()


async def test_a_version_too_old_to_watch_from_is_told_from_other_trouble(defined: ApiCluster, namespace: str) -> None:
    api = await connect(str(defined.kubeconfig))
    try:
        with pytest.raises(Expired):
            async for _ in api.watch(SERVICES, namespace, "1"):
                pass
    finally:
        await api.close()


def test_slices_that_kubernetes_makes_are_found_by_the_labels_of_their_service(defined: ApiCluster, namespace: str) -> None:
    client = defined.client
    labels = {"gantline.io/role": "server", "gantline.io/service": "real"}
    spec = {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": 8000, "protocol": "TCP"}]}
    meta = {"name": "real", "namespace": namespace, "labels": labels}
    apply(client, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
    path = f"/apis/{ENDPOINTS.api_version}/namespaces/{namespace}/{ENDPOINTS.plural}?labelSelector={quote(ENDPOINTS.selector)}"
    wait_until(lambda: bool(client.get(path)["items"]), what="the slice")
    assert client.get(path)["items"][0]["metadata"]["labels"]["kubernetes.io/service-name"] == "real"


def test_a_gateway_offers_what_the_api_server_has_and_holds_for_what_is_woken(defined: ApiCluster, namespace: str) -> None:
    scaling = {"min": 0, "max": 1}
    apply(defined.client, service(namespace, "sleeper", scaling=scaling, replicas=0))
    apply(defined.client, service(namespace, "stopped", replicas=0))
    process = GatewayProcess(f"--watch-namespaces={namespace}", "--drain-delay=0", KUBECONFIG=str(defined.kubeconfig)).wait_listening()
    try:
        wait_until(lambda: process.internal("/readyz").status_code == 200, what="the services to be known")
        assert [card["id"] for card in process.get("/v1/models").json()["data"]] == ["sleeper", "stopped"]
        answer = process.post("/v1/completions", {"model": "stopped", "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "scaled_to_zero")
        with ThreadPoolExecutor() as pool:
            held = pool.submit(process.post, "/v1/completions", {"model": "sleeper", "prompt": "x"})
            process.wait_demand(f"{namespace}/sleeper", held=1)
            delete(defined, namespace, "sleeper")
            assert (held.result().status_code, held.result().json()["error"]["code"]) == (404, "model_not_found")
    finally:
        process.stop()
