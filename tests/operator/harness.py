"""An operator in a thread of its own, against a real API server, and the oracle that every fault test ends with.

The thread has its own event loop, so that an operator can be stopped, killed between two writes, and started anew as a process would be.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gantline_devcluster import profiles
from gantline_devcluster.api_only import ApiCluster, add_nodes
from gantline_devcluster.client import ApiError
from gantline_devcluster.client import Client as DevClient
from gantline_devcluster.fates import FatePolicies
from gantline_devcluster.models import EIGHT_BILLION
from gantline_operator.client import Client, connect
from gantline_operator.controller import Controller
from gantline_operator.main import operate
from gantline_operator.resources import MANAGED_KINDS
from gantline_operator.settings import OperatorSettings

from tests.operator.definition import wait_until_served

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
SETTINGS = OperatorSettings(
    image_cuda="registry.example/gantline-runtime:test",
    image_cpu="registry.example/gantline-runtime-cpu:test",
    metrics_port=0,
    health_port=0,
    listen_address="127.0.0.1",
    workers=4,
)
KINDS = (*(kind.plural for kind in MANAGED_KINDS), "pods")
"""Of all that the operator makes, and that comes of it."""
_OPTIONAL = {kind.plural for kind in MANAGED_KINDS if kind.optional}
_GROUPS = {
    **{kind.plural: kind.api_version for kind in MANAGED_KINDS},
    "inferenceservices": "gantline.io/v1alpha1",
    "events": "events.k8s.io/v1",
}

FACTS: Object = EIGHT_BILLION
"""Of an 8B model."""
TINY: Object = {
    **FACTS,
    "numLayers": 2,
    "hiddenSize": 256,
    "intermediateSize": 768,
    "numHeads": 4,
    "numKvHeads": 2,
    "headDim": 64,
    "vocabSize": 4096,
    "weightBytes": 11_000_000,
    "name": "tiny",
    "maxPositionEmbeddings": 2048,
    "fingerprint": "sha256:0b",
}


class Operator:
    """One operator; `dead` tells that it ended."""

    def __init__(self, cluster: ApiCluster, settings: OperatorSettings = SETTINGS, *, kubeconfig: Path | None = None) -> None:
        self._kubeconfig = str(kubeconfig or cluster.kubeconfig)
        self._settings = settings
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.error: BaseException | None = None
        self.writes: list[tuple[str, str]] = []
        """(method, path) of each write, in order."""
        self.requests: list[tuple[str, str]] = []
        """(method, path) of each request but watches, in order, those of the view of the cluster among them."""
        self.reconciled: list[str] = []
        """Names of services that a pass has gone through, in order."""
        self.dead = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Operator:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive() and self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the operator does not stop"
        if self.error is not None:
            raise self.error

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self.error = error
        finally:
            self.dead.set()

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        client = await connect(self._kubeconfig)
        self._watch_writes(client)
        self._ready.set()
        try:
            await operate(self._settings, client, self._stop, build=self._build)
        finally:
            await client.close()

    def _build(self, client: Client, settings: OperatorSettings, version: str) -> Controller:
        controller = Controller(client, settings, version)
        reconcile = controller.reconcile

        async def watched(key: tuple[str, str]) -> float | None:
            again_s = await reconcile(key)
            self.reconciled.append(key[1])
            return again_s

        controller.reconcile = watched  # type: ignore[method-assign]
        return controller

    def _watch_writes(self, client: Client) -> None:
        send = client._send

        async def watched(method: str, path: str, **arguments: Any) -> bytes:
            self.requests.append((method, path))
            result = await send(method, path, **arguments)
            if method != "GET":
                self.writes.append((method, path))
            return result

        client._send = watched  # type: ignore[method-assign]


def service(name: str, namespace: str, **spec: Any) -> Object:
    """An InferenceService on a CPU whose model lies in the image, unless told otherwise."""
    model = spec.pop("model", {"uri": "file:///models/tiny"})
    spec.setdefault("accelerator", {"resource": "cpu"})
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": metadata, "spec": {"model": model, **spec}}


def answer(reason: str = "Completed", **fields: Any) -> str:
    """A termination message."""
    return json.dumps({"reason": reason, **fields}, separators=(",", ":"))


def apply(cluster: ApiCluster, *objects: Object) -> None:
    """By kubectl, as a user would, with strict validation."""
    cluster.kubectl("apply", "--validate=strict", "-f", "-", input="\n---\n".join(json.dumps(item) for item in objects))


def get(cluster: ApiCluster, plural: str, name: str, namespace: str) -> Object:
    """One object. Not by kubectl: tests ask until something is so, and a process for each question is what most of them would compute."""
    assert plural.endswith("s"), f"{plural} is no plural"
    result: Object = cluster.client.get(f"{path_of(plural, namespace)}/{name}")
    return result


def items(cluster: ApiCluster, plural: str, namespace: str) -> list[Object]:
    """All of a kind, by name; none of one that not every cluster knows, where this one does not."""
    try:
        found = cluster.client.get(path_of(plural, namespace)).get("items") or []
    except ApiError as error:
        if error.status != 404 or plural not in _OPTIONAL:
            raise
        found = []
    return sorted(found, key=lambda item: item["metadata"]["name"])


def path_of(plural: str, namespace: str) -> str:
    """Of the objects of a kind in the namespace."""
    version = _GROUPS.get(plural, "v1")
    return f"/{'apis' if '/' in version else 'api'}/{version}/namespaces/{namespace}/{plural}"


def status(cluster: ApiCluster, name: str, namespace: str) -> Object:
    found: Object = cluster.client.get(f"{path_of('inferenceservices', namespace)}/{name}").get("status") or {}
    return found


def reason(cluster: ApiCluster, name: str, namespace: str, kind: str = "Ready") -> str:
    conditions = {item["type"]: item for item in status(cluster, name, namespace).get("conditions") or []}
    return str(conditions.get(kind, {}).get("reason", ""))


def wait(check: Callable[[], Any], *, timeout_s: float = 60.0, what: Callable[[], object] = lambda: "", every_s: float = 0.1) -> Any:
    """`check`'s first true answer."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if result := check():
            return result
        time.sleep(every_s)
    raise AssertionError(f"still not so after {timeout_s:.0f} s: {what()}")


def wait_reason(cluster: ApiCluster, name: str, namespace: str, wanted: str, kind: str = "Ready", *, timeout_s: float = 60.0) -> Object:
    """The condition once it has this reason."""

    def check() -> Object | None:
        conditions = {item["type"]: item for item in status(cluster, name, namespace).get("conditions") or []}
        found: Object | None = conditions.get(kind)
        return found if found is not None and found["reason"] == wanted else None

    def now() -> object:
        return {
            item["type"]: (item["status"], item["reason"], item.get("message"))
            for item in status(cluster, name, namespace).get("conditions") or []
        }

    result: Object = wait(check, timeout_s=timeout_s, what=lambda: f"{kind} is not {wanted}: {now()}")
    return result


def versions(cluster: ApiCluster, namespace: str) -> dict[str, str]:
    """resourceVersions of all that the operator could touch: not of events of others, such as a scheduler that tries again."""
    found = {}
    for plural in (*KINDS, "inferenceservices", "events"):
        for item in items(cluster, plural, namespace):
            ours = plural != "events" or item.get("reportingController") == "gantline.io/operator"
            if ours and item["metadata"]["name"] not in ("default", "kube-root-ca.crt"):
                found[f"{plural}/{item['metadata']['name']}"] = item["metadata"]["resourceVersion"]
    return found


def children(cluster: ApiCluster, namespace: str, *plurals: str) -> list[str]:
    """Names by kind of all that is there, but for what the cluster and the chart made; pods are the cluster's own."""
    wanted = plurals or tuple(kind for kind in KINDS if kind != "pods")
    return [f"{plural}/{item['metadata']['name']}" for plural in wanted for item in items(cluster, plural, namespace) if not _foreign(item)]


def _foreign(item: Object) -> bool:
    metadata = item["metadata"]
    return bool(metadata["name"] == "default" or metadata.get("labels", {}).get("app.kubernetes.io/managed-by") == "Helm")


def assert_converged(cluster: ApiCluster, name: str, namespace: str, expected: list[str], *, quiet_s: float = 1.0) -> None:
    """The oracle: live == desired, nothing extra, observedGeneration == generation, and no resourceVersion moves any more."""
    wait_reason(cluster, name, namespace, "Ready")
    wait(lambda: children(cluster, namespace) == expected, what=lambda: (children(cluster, namespace), expected))
    wait(lambda: settled(cluster, namespace, quiet_s), what=lambda: "resourceVersions keep moving")
    parent = cluster.client.get(f"{path_of('inferenceservices', namespace)}/{name}")
    assert parent["status"]["observedGeneration"] == parent["metadata"]["generation"]
    assert {item["observedGeneration"] for item in parent["status"]["conditions"]} == {parent["metadata"]["generation"]}
    for plural in KINDS[:-1]:
        for item in items(cluster, plural, namespace):
            if not _foreign(item):
                owners = item["metadata"]["ownerReferences"]
                assert [owner["uid"] for owner in owners if owner.get("controller")] == [parent["metadata"]["uid"]]


def settled(cluster: ApiCluster, namespace: str, quiet_s: float) -> bool:
    before = versions(cluster, namespace)
    time.sleep(quiet_s)
    return versions(cluster, namespace) == before


def install_crd(cluster: ApiCluster) -> None:
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds" / "gantline.io_inferenceservices.yaml"))
    wait_until_served(cluster)


@contextmanager
def serving(cluster: ApiCluster, namespace: str, **changes: Any) -> Iterator[Operator]:
    """An operator for one namespace, which leaves the other tests' services alone."""
    with Operator(cluster, replace(SETTINGS, watch_namespaces=(namespace,), **changes)) as operator:
        yield operator


def volume(
    cluster: ApiCluster, namespace: str, claim: str, modes: Sequence[str] = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany")
) -> None:
    """A volume that is kept for this claim: the API-only cluster has no provisioner. It goes with the claim."""
    body = {
        "metadata": {"name": f"{namespace}-{claim}"},
        "spec": {
            "capacity": {"storage": "500Gi"},
            "accessModes": list(modes),
            "hostPath": {"path": "/nowhere"},
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": namespace, "name": claim},
        },
    }
    cluster.client.post("/api/v1/persistentvolumes", body)


def copied(before: float = 10.0, after: float = 10.2, **facts: Any) -> str:
    """What a quantize Job answers."""
    made = {
        **FACTS,
        "weightBytes": 5_700_000_000,
        "quantization": {"method": "awq", "bits": 4, "groupSize": 128, "version": "gemm"},
        **facts,
    }
    artefact = {
        "kind": "awq",
        "path": "/mnt/cache/awq-x",
        "weight_bytes": 5_700_000_000,
        "facts": made,
        "perplexity": {"before": before, "after": after},
    }
    return answer(artefact=artefact)


def fate(cluster: ApiCluster, role: str, name: str, how: str, message: str = "", **details: Any) -> None:
    """What becomes of the pods of a service's role from now on."""
    fates(cluster, [(role, name, how, message, details)])


def fates(cluster: ApiCluster, wanted: Iterable[tuple[str, str, str, str, Object]]) -> None:
    """Several at once: each takes the API server a second to notice."""

    def script(item: tuple[str, str, str, str, Object]) -> None:
        role, name, how, message, details = item
        client = DevClient(cluster.kubeconfig)
        FatePolicies(client).set({"gantline.io/role": role, "gantline.io/service": name}, how, message=message, **details)
        client.close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(script, wanted))


def inspected(**models: Object) -> list[tuple[str, str, str, str, Object]]:
    """Fates of inspect Jobs by the service's name: each finds these facts."""
    return [("inspect", name, "complete", answer(facts=facts), {}) for name, facts in models.items()]


def gpu_nodes(cluster: ApiCluster, namespace: str, profile: str, count: int = 1, *, name: str = "") -> Object:
    """Nodes for one test alone; the spec that goes there. Services of a test before, which are being deleted, keep off.

    Their names were never used before: kwok takes a minute to notice a node that comes back under its old name.
    """
    nodes = profiles.load(profile, count)
    for node in nodes:
        node["metadata"]["name"] += namespace.removeprefix("test") + name
        node["metadata"]["labels"] |= {"for": namespace, "kubernetes.io/hostname": node["metadata"]["name"]}
    add_nodes(cluster.client, nodes)
    return {"accelerator": {"resource": "auto", "nodeSelector": {"for": namespace}}}


def remove_gpu_nodes(cluster: ApiCluster, namespace: str) -> None:
    found = cluster.client.get(f"/api/v1/nodes?labelSelector=for%3D{namespace}").get("items") or []
    if found:
        cluster.remove_nodes(*(node["metadata"]["name"] for node in found))


def patch(cluster: ApiCluster, name: str, namespace: str, spec: Object) -> None:
    cluster.kubectl("patch", "gisvc", name, "-n", namespace, "--type=merge", "-p", json.dumps({"spec": spec}))


def event_reasons(cluster: ApiCluster, name: str, namespace: str) -> list[str]:
    """Of the events about the service, oldest first."""
    found = [
        item
        for item in items(cluster, "events", namespace)
        if item["regarding"]["kind"] == "InferenceService" and item["regarding"]["name"] == name
    ]
    return [item["reason"] for item in sorted(found, key=lambda item: item["eventTime"])]


def wait_events(cluster: ApiCluster, name: str, namespace: str, *wanted: str) -> None:
    """Until the events with one of these reasons are these, in this order: they are sent after the status that they tell of."""

    def told() -> list[str]:
        return [reason for reason in event_reasons(cluster, name, namespace) if reason in wanted]

    wait(lambda: told() == list(wanted), timeout_s=60.0, what=told)


def server_pods(cluster: ApiCluster, name: str, namespace: str) -> list[Object]:
    pods = items(cluster, "pods", namespace)
    return [
        pod
        for pod in pods
        if pod["metadata"]["labels"].get("gantline.io/role") == "server" and pod["metadata"]["labels"]["gantline.io/service"] == name
    ]
