"""The API-only cluster: what the rest of the suite stands on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError, Client
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.stages import FATE, FATES

pytestmark = pytest.mark.apiserver


def eventually(read: Callable[[], Any], wanted: Callable[[Any], bool], timeout_s: float = 180.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        value = read()
        if wanted(value) or time.monotonic() > deadline:
            assert wanted(value), f"still {value!r} after {timeout_s} s"
            return value
        time.sleep(0.1)


def pods_of(cluster: ApiCluster, namespace: str, **labels: str) -> list[dict[str, Any]]:
    selector = "%2C".join(f"{key}%3D{value}" for key, value in labels.items())
    return list(cluster.client.get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}")["items"])


def job(name: str, **annotations: str) -> dict[str, Any]:
    notes = {f"simulated.gantline.io/{key.replace('_', '-')}": value for key, value in annotations.items()}
    pod = {"restartPolicy": "Never", "containers": [{"name": "work", "image": "none"}]}
    template = {"metadata": {"annotations": notes, "labels": {"app": name}}, "spec": pod}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"backoffLimit": 0, "template": template}}


def deployment(name: str, fate: str = "", gpus: int = 0, replicas: int = 1) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    pod = {"containers": [{"name": "serve", "image": "none", "resources": {"limits": limits}}]}
    template = {"metadata": {"labels": {"app": name}, "annotations": {FATE: fate} if fate else {}}, "spec": pod}
    spec = {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def test_objects_are_created_read_patched_and_deleted_with_kubectl(api_cluster: ApiCluster, namespace: str) -> None:
    api_cluster.kubectl("create", "configmap", "notes", "--from-literal=a=1", "-n", namespace)
    api_cluster.kubectl("patch", "configmap", "notes", "-n", namespace, "-p", '{"data":{"b":"2"}}')
    stored = json.loads(api_cluster.kubectl("get", "configmap", "notes", "-n", namespace, "-o", "json").stdout)
    assert stored["data"] == {"a": "1", "b": "2"}
    api_cluster.kubectl("delete", "configmap", "notes", "-n", namespace)
    with pytest.raises(DevclusterError, match="NotFound"):
        api_cluster.kubectl("get", "configmap", "notes", "-n", namespace)


def test_a_service_account_may_do_what_its_role_says_and_nothing_else(api_cluster: ApiCluster, namespace: str) -> None:
    api_cluster.kubectl("create", "serviceaccount", "reader", "-n", namespace)
    api_cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=configmaps", "-n", namespace)
    api_cluster.kubectl("create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:reader", "-n", namespace)
    reader = Client(api_cluster.service_account_kubeconfig(namespace, "reader"))
    assert eventually(lambda: status_of(reader, f"/api/v1/namespaces/{namespace}/configmaps"), lambda s: s == 200) == 200
    assert status_of(reader, f"/api/v1/namespaces/{namespace}/secrets") == 403
    reader.close()


def status_of(client: Client, path: str) -> int:
    try:
        client.get(path)
    except ApiError as error:
        return error.status
    return 200


def test_a_service_of_ready_simulated_pods_has_endpoints(simulated_nodes: ApiCluster, namespace: str) -> None:
    simulated_nodes.simulate("cpu", 1)
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
    }
    simulated_nodes.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(body))
    simulated_nodes.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(deployment("web", replicas=2)))
    simulated_nodes.kubectl("rollout", "status", "deployment/web", "-n", namespace, "--timeout=90s")
    slices = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"

    def addresses() -> set[str]:
        endpoints = (e for s in simulated_nodes.client.get(slices)["items"] for e in s.get("endpoints") or [])
        return {address for e in endpoints if e["conditions"]["ready"] for address in e["addresses"]}

    assert len(eventually(addresses, lambda found: len(found) == 2)) == 2


def test_the_scheduler_places_what_fits_on_simulated_gpus_and_leaves_the_rest_pending(simulated_nodes: ApiCluster, namespace: str) -> None:
    simulated_nodes.simulate("h100", 1)
    simulated_nodes.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(deployment("big", gpus=4, replicas=3)))

    def phases() -> list[str]:
        return sorted(p["status"]["phase"] for p in pods_of(simulated_nodes, namespace, app="big"))

    eventually(phases, lambda found: found == ["Pending", "Running", "Running"])
    pending = next(p for p in pods_of(simulated_nodes, namespace, app="big") if p["status"]["phase"] == "Pending")

    def scheduled() -> str:
        pod = simulated_nodes.client.get(f"/api/v1/namespaces/{namespace}/pods/{pending['metadata']['name']}")
        return str(next((c.get("message", "") for c in pod["status"].get("conditions", []) if c["type"] == "PodScheduled"), ""))

    eventually(scheduled, lambda message: "Insufficient nvidia.com/gpu" in message)


def seen(pod: dict[str, Any]) -> dict[str, Any]:
    """What of a pod's status its fate decides."""
    status = pod["status"]
    container = next(iter(status.get("containerStatuses", [])), {})
    state = container.get("state", {})
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
    ready = next((c["status"] for c in status.get("conditions", []) if c["type"] == "Ready"), "")
    return {
        "phase": status["phase"], "reason": status.get("reason", ""), "ready": ready, "waiting": state.get("waiting", {}).get("reason", ""),
        "code": ended.get("exitCode"), "why": ended.get("reason", ""), "message": ended.get("message", ""),
    }  # fmt: skip


FATES_OF_JOBS = {
    "complete": {"phase": "Succeeded", "code": 0, "why": "Completed"},
    "failed": {"phase": "Failed", "code": 42, "why": "Error"},
    "oom": {"phase": "Failed", "code": 137, "why": "OOMKilled"},
    "evicted": {"phase": "Failed", "reason": "Evicted", "code": None},
}
FATES_OF_DEPLOYMENTS = {
    "ready": {"phase": "Running", "ready": "True"},
    "never-ready": {"phase": "Running", "ready": "False", "waiting": ""},
    "crash-loop": {"phase": "Running", "ready": "False", "waiting": "CrashLoopBackOff", "code": 1, "why": "Error"},
    "oom": {"phase": "Running", "waiting": "CrashLoopBackOff", "code": 137, "why": "OOMKilled"},
    "image-pull": {"phase": "Pending", "waiting": "ImagePullBackOff"},
    "pending": {"phase": "Pending", "ready": "", "waiting": ""},
}


def test_every_fate_becomes_the_status_that_a_kubelet_would_report(simulated_nodes: ApiCluster, namespace: str) -> None:
    assert set(FATES_OF_JOBS) | set(FATES_OF_DEPLOYMENTS) == set(FATES)
    simulated_nodes.simulate("cpu", 1)
    message = '{"reason": "NotAModel", "message": "no \'config.json\'"}\nsecond line'
    objects = [job(f"job-{fate}", fate=fate, exit_code="42", termination_message=message) for fate in FATES_OF_JOBS]
    objects += [deployment(f"deployment-{fate}", fate=fate) for fate in FATES_OF_DEPLOYMENTS]
    simulated_nodes.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    expected = {f"job-{k}": v for k, v in FATES_OF_JOBS.items()} | {f"deployment-{k}": v for k, v in FATES_OF_DEPLOYMENTS.items()}

    def matching() -> dict[str, Any]:
        found = {p["metadata"]["labels"]["app"]: seen(p) for p in pods_of(simulated_nodes, namespace) if p["spec"].get("nodeName")}
        return {name: found.get(name) for name, wanted in expected.items() if not wanted.items() <= (found.get(name) or {}).items()}

    assert eventually(matching, lambda wrong: not wrong) == {}
    ended = seen(pods_of(simulated_nodes, namespace, app="job-failed")[0])
    assert ended["message"] == message
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs/"
    assert eventually(lambda: simulated_nodes.client.get(f"{path}job-complete")["status"].get("succeeded"), lambda n: n == 1)
    assert eventually(lambda: simulated_nodes.client.get(f"{path}job-failed")["status"].get("failed"), lambda n: n == 1)


def test_a_fate_can_be_set_for_pods_that_somebody_else_renders(simulated_nodes: ApiCluster, namespace: str) -> None:
    simulated_nodes.simulate("cpu", 1)
    facts = json.dumps({"reason": "Completed", "facts": {"layers": 4}})
    simulated_nodes.set_fate({"app": "inspect"}, "complete", message=facts, namespace=namespace)
    simulated_nodes.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(job("inspect")))
    pod = eventually(lambda: pods_of(simulated_nodes, namespace, app="inspect"), lambda p: bool(p) and seen(p[0])["phase"] == "Succeeded")[
        0
    ]
    assert seen(pod)["message"] == facts
    with pytest.raises(DevclusterError, match="no fate 'sleepy'"):
        simulated_nodes.set_fate({"app": "x"}, "sleepy")


def test_a_deleted_job_and_its_running_pod_vanish(simulated_nodes: ApiCluster, namespace: str) -> None:
    simulated_nodes.simulate("cpu", 1)
    simulated_nodes.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(job("endless", fate="ready")))
    eventually(lambda: pods_of(simulated_nodes, namespace, app="endless"), lambda p: bool(p) and p[0]["status"]["phase"] == "Running")
    simulated_nodes.kubectl("delete", "job", "endless", "-n", namespace)
    eventually(lambda: pods_of(simulated_nodes, namespace, app="endless"), lambda p: not p)


def test_a_node_that_takes_the_name_of_one_that_was_removed_runs_pods_at_once(simulated_nodes: ApiCluster, namespace: str) -> None:
    for turn in range(3):
        simulated_nodes.simulate("cpu", 1)
        name = f"turn-{turn}"
        simulated_nodes.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(job(name, fate="complete")))
        running = lambda pods: bool(pods) and pods[0]["status"]["phase"] == "Succeeded"
        found = eventually(lambda name=name: pods_of(simulated_nodes, namespace, app=name), running, timeout_s=30)
        assert running(found), f"in turn {turn}, which is less than what kwok waits for a Lease"
        simulated_nodes.remove_nodes()


def test_an_outage_ends_with_the_same_data_at_the_same_address(api_cluster: ApiCluster, namespace: str) -> None:
    api_cluster.kubectl("create", "configmap", "before", "-n", namespace)
    url = api_cluster.url
    api_cluster.stop_apiserver()
    assert not api_cluster.client.ready()
    api_cluster.start_apiserver()
    assert api_cluster.url == url
    assert api_cluster.client.get(f"/api/v1/namespaces/{namespace}/configmaps/before")["metadata"]["name"] == "before"


OWNER = """
import sys, time
from gantline_devcluster.api_only import ApiCluster
cluster = ApiCluster(controllers=False).start()
print(cluster.folder, cluster._keeper.pid, *cluster.pids.values(), flush=True)
time.sleep(60)
"""


def test_nothing_is_left_when_the_owner_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder, *pids = owner.stdout.readline().split()
        assert len(pids) == 3  # the keeper, etcd, kube-apiserver
        owner.send_signal(signal.SIGKILL)
    eventually(lambda: [pid for pid in pids if running(int(pid))], lambda left: not left)
    eventually(Path(folder).exists, lambda there: not there)


def running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_nothing_is_left_when_the_keeper_is_killed() -> None:
    cluster = ApiCluster(controllers=False).start()
    pids = list(cluster.pids.values())
    assert cluster._keeper is not None
    os.kill(cluster._keeper.pid, signal.SIGKILL)
    eventually(lambda: [pid for pid in pids if running(pid)], lambda left: not left)
    cluster.stop()
    assert not cluster.folder.exists()
