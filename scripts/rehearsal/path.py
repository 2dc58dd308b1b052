"""The quickstart's path and what comes after it: upgrade, test, roll out, scale, share a GPU, delete, uninstall."""

from __future__ import annotations

import json
import re
import subprocess
from datetime import datetime
from functools import partial
from typing import Any

from gantline_devcluster import profiles

from scripts.rehearsal import gateways
from scripts.rehearsal.cluster import ROOT, SERVERS, Rehearsal, RehearsalFailed
from scripts.rehearsal.images import images_of
from scripts.rehearsal.pods import lone_pod, run_pod

__all__ = ["quickstart", "record_readiness", "remove", "roll_out", "scale", "share_one_gpu", "test_chart", "upgrade_chart"]

GPU = "nvidia.com/gpu"
RELEASE = "app.kubernetes.io/instance=gantline"
KINDS = "deployments,pods,services,configmaps,serviceaccounts,poddisruptionbudgets,roles,rolebindings,clusterroles,clusterrolebindings"


def quickstart(rehearsal: Rehearsal) -> None:
    """`make quickstart` itself, its lines shown as they come."""
    repository = f"{rehearsal.cluster.registry}/gantline"
    command = ["make", "quickstart", f"KUBECONFIG={rehearsal.cluster.kubeconfig}", f"IMAGE_REPOSITORY={repository}"]
    print(f"$ {' '.join(command)}", flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=rehearsal.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            lines.append(line.strip())
    if process.returncode or not any(re.search(r"^chat {2}\S", line) for line in lines):
        raise RehearsalFailed(f"make quickstart ended with code {process.returncode}, or without an answer")
    done = filter(None, (re.match(r"✓ \[\d+/\d+\] (.+?)  (\d+ s)$", line) for line in lines))
    rehearsal.figures += [(f"  {phase[1].replace(repository, '...')}", phase[2]) for phase in done]


def record_readiness(rehearsal: Rehearsal) -> None:
    """Of the first serving pod, whose image is on the node by then: from its creation to Ready."""
    pod = rehearsal.pods(SERVERS)[0]
    ready_at = next(c["lastTransitionTime"] for c in pod["status"]["conditions"] if c["type"] == "Ready")
    seconds = (datetime.fromisoformat(ready_at) - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
    rehearsal.figures.append(("serving pod, from created to Ready, image on the node", f"{seconds:.0f} s"))


def upgrade_chart(rehearsal: Rehearsal) -> None:
    """Other settings of the operator, an image for GPUs, API keys at the gateway: both are replaced, and no serving pod is."""
    before, images = rehearsal.serving_pods(), images_of(rehearsal)
    cuda = images.get("runtime", images["runtime-cpu"])
    changed = {"operator.logLevel": "debug", "gateway.apiKeys.enabled": "true", "runtime.images.cuda": cuda}
    given = ",".join(f"{name}={value}" for name, value in changed.items())
    gateways.offer_keys(rehearsal)
    with gateways.streams(rehearsal, 4, tokens=60):
        rehearsal.helm("upgrade", "charts/gantline", "--reuse-values", "--set", given, "--wait", "--timeout", "5m")
        rehearsal.until("the service is Ready under the upgraded operator", lambda: rehearsal.ready(1))
        gateways.share(rehearsal)
    if rehearsal.serving_pods() != before:
        raise RehearsalFailed("the upgrade of the chart replaced serving pods")


def test_chart(rehearsal: Rehearsal) -> None:
    """By then the upgraded operator has certainly looked at every service."""
    before = rehearsal.serving_pods()
    rehearsal.helm("test", "--timeout", "8m")
    if rehearsal.serving_pods() != before:
        raise RehearsalFailed("the upgraded operator replaced serving pods")


def roll_out(rehearsal: Rehearsal) -> None:
    before = rehearsal.serving_pods()
    patch = json.dumps({"spec": {"engine": {"maxBatchSize": 8}}})
    with gateways.streams(rehearsal, 4, tokens=60):
        rehearsal.run("kubectl", "patch", "gisvc", "chat", "--type=merge", "--patch", patch)
        rehearsal.until("no pod of the old revision is left", lambda: not before & rehearsal.serving_pods())
        rehearsal.until("the new revision is Ready", lambda: rehearsal.ready(1))


def scale(rehearsal: Rehearsal) -> None:
    for replicas in (2, 1):
        rehearsal.run("kubectl", "scale", "gisvc/chat", f"--replicas={replicas}")
        rehearsal.until(f"{replicas} replicas are ready", partial(rehearsal.ready, replicas))


def share_one_gpu(rehearsal: Rehearsal) -> None:
    """A GPU that the kubelet counts and allocates, and that is not there: the first service gets it and says what is wrong with it, the
    second waits, visibly, and gets it when the first is gone.
    """
    labels = {**profiles.load("h100", 1)[0]["metadata"]["labels"], "nvidia.com/gpu.count": "1"}
    gpu_labels = [f"{key}={value}" for key, value in labels.items() if key.startswith("nvidia.com/")]
    rehearsal.run("kubectl", "label", "node", "node-0", "--overwrite", *gpu_labels)
    rehearsal.cluster.offer_devices(GPU, 1)
    rehearsal.until("the kubelet offers the GPU", lambda: rehearsal.get("node", "node-0")["status"]["allocatable"].get(GPU) == "1")
    image = images_of(rehearsal)["runtime-cpu"]
    given = run_pod(rehearsal, lone_pod("given", image, ["printenv", "GANTLINE_DEVICES"], 1000, {GPU: "1"})).strip()
    if given != "gpu-0":
        raise RehearsalFailed(f"the kubelet gave a pod {given!r}")
    rehearsal.apply(gpu_service("first"))
    fault = partial(rehearsal.condition, "first", "Ready")
    rehearsal.until("the first names the GPU's fault", lambda: "torch sees no GPU" in fault().get("message", ""))
    rehearsal.apply(gpu_service("second"))
    scheduled = partial(rehearsal.condition, "second", "Scheduled")
    rehearsal.until("the second waits for capacity", lambda: scheduled().get("reason") == "WaitingForCapacity")
    rehearsal.run("kubectl", "delete", "gisvc/first", "--timeout=120s")
    rehearsal.until("the second has the GPU", lambda: scheduled().get("status") == "True")
    rehearsal.run("kubectl", "delete", "gisvc/second", "--timeout=120s")


def gpu_service(name: str) -> dict[str, Any]:
    spec = {
        "model": {"uri": "file:///opt/gantline/tiny-model"},
        "engine": {"backend": "torch"},
        "accelerator": {"resource": GPU},
        "pod": {"resources": {"requests": {"cpu": "100m", "memory": "512Mi"}}},  # a machine of two cores has room for the rest too
    }
    return {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": {"name": name}, "spec": spec}


def remove(rehearsal: Rehearsal) -> None:
    rehearsal.run("kubectl", "delete", "-f", "examples/quickstart.yaml", "--timeout=120s")
    rehearsal.until("no pod of the service is left", lambda: not rehearsal.pods("gantline.io/service=chat"))
    rehearsal.helm("uninstall", "--wait", "--timeout", "4m")
    if not rehearsal.get("crd", "inferenceservices.gantline.io"):
        raise RehearsalFailed("helm uninstall took the CustomResourceDefinition, and with it every service, away")
    left = partial(rehearsal.run, "kubectl", "get", KINDS, "-A", "-l", RELEASE, "-o", "name")
    rehearsal.until("nothing of the release is left", lambda: not left().strip(), timeout_s=180)
