"""The real node: what a person does with it from a shell, and what it leaves when it is gone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.binaries import find
from gantline_devcluster.client import ApiError
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.node import cgroups
from gantline_devcluster.node.cluster import NodeCluster
from gantline_devcluster.node.images import RUNTIME_IMAGE
from gantline_devcluster.node.requirements import why_no_node

pytestmark = pytest.mark.node

SERVER = """
import http.server, os
import torch

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{torch.arange(5).sum().item()} {os.getuid()} {open('/data/visits').read()}".encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
        if self.path != "/":
            print("visited", self.path, flush=True)

    def log_message(self, *ignored):
        pass

with open("/data/visits", "a") as file:
    file.write("x")
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
RESTRICTED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def eventually(read: Callable[[], Any], wanted: Callable[[Any], bool], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not wanted(value := read()):
        assert time.monotonic() < deadline, f"still {value!r} after {timeout_s} s"
        time.sleep(0.2)
    return value


def server(user: int) -> list[dict[str, Any]]:
    """A namespace that enforces `restricted`, a claim, a server that imports torch and writes into the claim, and its Service."""
    container = {
        "name": "server",
        "image": RUNTIME_IMAGE,
        "command": ["python", "-c", SERVER],
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "50m"}, "limits": {"memory": "2Gi"}},
        "readinessProbe": {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": user, "fsGroup": user, "seccompProfile": {"type": "RuntimeDefault"}},
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}, {"name": "tmp", "emptyDir": {}}],
    }
    labels = {"app": "server"}
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    at_once = {**claim, "storageClassName": "standard-immediate"}
    meta: Callable[[str], dict[str, str]] = lambda name: {"name": name, "namespace": "restricted"}
    enforced = {"name": "restricted", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": enforced},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta("data"), "spec": claim},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": meta("at-once"),
            "spec": at_once,
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": meta("server"),
            "spec": {
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta("server"),
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": 8000}]},
        },
    ]


@pytest.fixture(scope="module")
def cluster(node_cluster: NodeCluster) -> Iterator[NodeCluster]:
    objects = json.dumps({"apiVersion": "v1", "kind": "List", "items": server(65532)})
    node_cluster.kubectl("apply", "-f", "-", input=objects)
    node_cluster.kubectl("rollout", "status", "deployment/server", "-n", "restricted", "--timeout=110s")
    yield node_cluster
    node_cluster.kubectl("delete", "namespace", "restricted", "--wait=false")


def get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=20) as answer:
        return str(answer.read().decode())


def test_a_restricted_pod_with_torch_answers_by_its_services_address_and_name(cluster: NodeCluster) -> None:
    address = cluster.client.get("/api/v1/namespaces/restricted/services/server")["spec"]["clusterIP"]
    asking = "import sys, urllib.request as r\nfor host in sys.argv[1:]: print(r.urlopen(f'http://{host}/', timeout=10).read().decode())"
    names = [address, "server", "server.restricted.svc.cluster.local"]
    ask = ("exec", "-n", "restricted", "deployment/server", "--", "python", "-c", asking, *names)
    # A Service's address follows its pods' readiness a moment later.
    answer = eventually(lambda: cluster.kubectl(*ask, check=False), lambda answer: answer.returncode == 0)
    assert answer.stdout.splitlines() == ["10 65532 x"] * 3


def test_nothing_outside_can_be_reached_and_that_is_said_at_once(cluster: NodeCluster) -> None:
    asking = (
        "import socket, time\nstarted = time.time()\n"
        "for host in (*['192.0.2.1'] * 50, 'example.com'):\n"
        "    try: socket.create_connection((host, 80), 10); print('reached', host)\n"
        "    except OSError as error: print(type(error).__name__, error)\n"
        "print('quickly' if time.time() - started < 3 else 'slowly')"
    )
    said = cluster.kubectl("exec", "-n", "restricted", "deployment/server", "--", "python", "-c", asking).stdout
    assert "unreachable" in said and "not known" in said and "quickly" in said and "reached" not in said


def test_logs_follow_what_the_pod_prints(cluster: NodeCluster) -> None:
    port = cluster.expose("restricted/server:http")
    command = [str(find("kubectl")), "--kubeconfig", str(cluster.kubeconfig), "logs", "-f", "-n", "restricted", "deployment/server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        for number in range(3):
            get(f"http://127.0.0.1:{port}/round-{number}")
            assert follower.stdout.readline() == f"visited /round-{number}\n"
        follower.terminate()


def test_port_forward_reaches_the_pod(cluster: NodeCluster) -> None:
    command = [str(find("kubectl")), "--kubeconfig", str(cluster.kubeconfig), "port-forward", "-n", "restricted", "service/server", ":80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
        assert forward.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
        assert found is not None
        assert get(f"http://127.0.0.1:{found[1]}/").startswith("10 65532")
        forward.terminate()


def test_a_service_is_exposed_on_a_loopback_port_that_stays_the_same(cluster: NodeCluster) -> None:
    port = cluster.expose("restricted/server:80")
    assert cluster.expose("restricted/server:80") == port
    assert get(f"http://127.0.0.1:{port}/").startswith("10 65532")
    assert cluster.order(do="status")["exposed"][str(port)] == "restricted/server:80"
    cluster.unexpose(port)
    with pytest.raises(urllib.error.URLError):
        get(f"http://127.0.0.1:{port}/")
    with pytest.raises(DevclusterError, match="no Service restricted/nobody"):
        cluster.expose("restricted/nobody:80")
    with pytest.raises(DevclusterError, match="Its ports are: 80"):
        cluster.expose("restricted/server:81")


def volume_of(cluster: NodeCluster, claim: str) -> str:
    return str(cluster.client.get(f"/api/v1/namespaces/restricted/persistentvolumeclaims/{claim}")["spec"].get("volumeName", ""))


def test_a_claims_data_outlives_its_pod_and_vanishes_with_the_claim(cluster: NodeCluster) -> None:
    folder = cluster.run.volumes / volume_of(cluster, "data")
    assert (folder / "visits").read_text() == "x"
    cluster.kubectl("rollout", "restart", "deployment/server", "-n", "restricted")
    cluster.kubectl("rollout", "status", "deployment/server", "-n", "restricted", "--timeout=110s")
    assert (folder / "visits").read_text() == "xx"
    at_once = eventually(lambda: volume_of(cluster, "at-once"), bool)
    cluster.kubectl("delete", "pvc", "at-once", "-n", "restricted")
    eventually((cluster.run.volumes / at_once).exists, lambda there: not there)

    def volume_status() -> int:
        try:
            cluster.client.get(f"/api/v1/persistentvolumes/{at_once}")
        except ApiError as error:
            return error.status
        return 200

    eventually(volume_status, lambda status: status == 404)


def process_of(cluster: NodeCluster, name: str) -> int:
    for pid in cgroups.processes(cluster.run.cgroup):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return pid
    return 0


def test_a_component_that_dies_is_started_again_and_status_says_so(cluster: NodeCluster) -> None:
    os.kill(process_of(cluster, "kube-proxy"), signal.SIGKILL)
    component = eventually(lambda: cluster.order(do="status")["components"]["kube-proxy"], lambda c: c["running"] and c["restarts"] == 1)
    assert component["code"] == -signal.SIGKILL
    assert process_of(cluster, "kube-proxy")


def test_simulated_nodes_stand_beside_the_real_one_and_take_no_real_work(cluster: NodeCluster) -> None:
    names = cluster.simulate("h100", 2)
    nodes = {n["metadata"]["name"]: n for n in cluster.client.get("/api/v1/nodes")["items"]}
    assert set(nodes) == {"node-0", *names}
    assert nodes[names[0]]["status"]["allocatable"]["nvidia.com/gpu"] == "8"
    assert any(t["effect"] == "NoSchedule" and t["key"] == "kwok.x-k8s.io/node" for t in nodes[names[0]]["spec"]["taints"])
    for name in names:
        cluster.kubectl("delete", "node", name)


def test_the_command_line_tells_a_person_how_the_cluster_is(cluster: NodeCluster) -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "gantline_devcluster", "--name", cluster.run.name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    status = said("status")
    assert all(name in status for name in ("kube-apiserver", "kubelet", "containerd", "etcd")), status
    assert json.loads(said("status", "--json"))["phase"] == "ready"
    assert said("kubeconfig").strip() == str(cluster.kubeconfig)
    assert "kubelet" in said("logs")
    assert len(said("logs", "kubelet", "--tail=3").splitlines()) == 3


def test_up_again_finds_the_running_cluster(cluster: NodeCluster) -> None:
    before, started = cluster.state()["pid"], time.monotonic()
    cluster.up()
    assert cluster.state()["pid"] == before
    assert time.monotonic() - started < 5


def test_after_a_kill_of_the_supervisor_nothing_lives_and_down_leaves_nothing() -> None:
    """A cluster of its own, killed while it starts containers: the hardest moment for those who clean up."""
    if why := why_no_node():
        pytest.skip(why)
    cluster = NodeCluster("test-killed")
    mounts = Path("/proc/self/mountinfo").read_text()
    try:
        cluster.up()
        port = cluster.state()["api_port"]
        cluster.kubectl("create", "deployment", "idle", f"--image={RUNTIME_IMAGE}", "--replicas=3", "--", "sleep", "600")
        eventually(lambda: process_of(cluster, "sleep"), bool)
        os.kill(cluster.supervisor(), signal.SIGKILL)
        eventually(lambda: cgroups.processes(cluster.run.cgroup), lambda left: not left, timeout_s=20)
        assert cluster.supervisor() == 0
    finally:
        assert cluster.down() == []
    assert not cluster.run.folder.exists()
    assert not any((tree.point / cluster.run.cgroup).exists() for tree in cgroups.hierarchies())
    assert Path("/proc/self/mountinfo").read_text() == mounts
    with pytest.raises(urllib.error.URLError):
        get(f"http://127.0.0.1:{port}/")
