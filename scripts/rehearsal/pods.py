"""Each image as a user that it has never heard of, its root read-only, nothing to write to but a /tmp."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from scripts.rehearsal.cluster import NAMESPACE, Rehearsal, RehearsalFailed
from scripts.rehearsal.images import KERNEL_MODEL, KERNEL_TARGET, images_of

__all__ = ["lone_pod", "run_as_anyone", "run_pod"]

Object = dict[str, Any]
MODEL = "/opt/gantline/tiny-model"
ASK = """
import json, urllib.request
body = json.dumps({"model": "tiny-model", "prompt": "The licence", "max_tokens": 4}).encode()
request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", body, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=120).read().decode())
"""


def run_as_anyone(rehearsal: Rehearsal) -> None:
    """Operator and gateway as the chart runs them but for the user, a server that is asked, and a look for the kernels made beforehand."""
    images = images_of(rehearsal)
    rehearsal.run("kubectl", "logs", copied_pod(rehearsal, "gantline"), "-n", NAMESPACE)
    models = rehearsal.run("kubectl", "get", "--raw", f"{proxy(copied_pod(rehearsal, 'gantline-gateway'))}:8080/proxy/v1/models")
    if "chat" not in [model["id"] for model in json.loads(models)["data"]]:
        raise RehearsalFailed(f"a gateway as another user does not offer the service: {models}")
    rehearsal.run("kubectl", "delete", "pods", "-n", NAMESPACE, "-l", "rehearsal=anyone", "--grace-period=1")

    serve = lone_pod("anyone-serve", images["runtime-cpu"], ["gantline", "serve", MODEL, "--host", "0.0.0.0"], anyone())
    rehearsal.apply(serve)
    rehearsal.run("kubectl", "wait", "pod/anyone-serve", "--for=condition=Ready", "--timeout=5m")
    answer = rehearsal.run("kubectl", "exec", "anyone-serve", "--", "python", "-c", ASK)
    if not json.loads(answer)["choices"][0]["text"]:
        raise RehearsalFailed(f"a server as another user answered {answer}")
    rehearsal.run("kubectl", "delete", "pod/anyone-serve", "--grace-period=1")

    if "runtime" in images:
        generate = ["gantline", "generate", MODEL, "What does os.path.join do?", "--max-tokens", "8"]
        run_pod(rehearsal, lone_pod("anyone-runtime", images["runtime"], generate, anyone()))
        check = ["gantline", "prebuild-kernels", "--check", "--models", KERNEL_MODEL, "--targets", KERNEL_TARGET]
        said = run_pod(rehearsal, lone_pod("anyone-kernels", images["runtime"], check, anyone())).strip()
        print(f"  {said}", flush=True)


def anyone() -> int:
    return random.randrange(100_000, 2_000_000_000)


def proxy(pod: str) -> str:
    """Path of a pod of the release's namespace below the API server, to which `:PORT/proxy/...` is added."""
    return f"/api/v1/namespaces/{NAMESPACE}/pods/{pod.removeprefix('pod/')}"


def copied_pod(rehearsal: Rehearsal, deployment: str) -> str:
    """A pod like those of a Deployment of the chart, as another user, not counted among them; returns its name once it is Ready."""
    template = rehearsal.get("deployment", deployment, "-n", NAMESPACE)["spec"]["template"]
    spec, user = copy.deepcopy(template["spec"]), anyone()
    spec["securityContext"] |= {"runAsUser": user, "runAsGroup": user, "fsGroup": user}
    if not all(container["securityContext"]["readOnlyRootFilesystem"] for container in spec["containers"]):
        raise RehearsalFailed(f"the chart's {deployment} has a root that it can write to")
    metadata = {"name": f"anyone-{deployment}", "namespace": NAMESPACE, "labels": {"rehearsal": "anyone"}}
    rehearsal.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    rehearsal.run("kubectl", "wait", f"pod/{metadata['name']}", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=2m")
    return f"pod/{metadata['name']}"


def run_pod(rehearsal: Rehearsal, pod: Object) -> str:
    """Run it to its end, remove it, and return what it wrote. Raises RehearsalFailed with its log where it does not succeed."""
    name = f"pod/{pod['metadata']['name']}"
    rehearsal.apply(pod)
    rehearsal.until(f"{name} ended", lambda: rehearsal.get(name)["status"]["phase"] in ("Succeeded", "Failed"), timeout_s=1200)
    log = rehearsal.run("kubectl", "logs", name)
    if rehearsal.get(name)["status"]["phase"] != "Succeeded" or not log.strip():
        raise RehearsalFailed(f"{name} failed as user {pod['spec']['securityContext']['runAsUser']} with a read-only root:\n{log}")
    rehearsal.run("kubectl", "delete", name, "--grace-period=1")
    return log


def lone_pod(name: str, image: str, command: list[str], user: int, devices: dict[str, str] | None = None) -> Object:
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "main", "image": image, "command": command, "securityContext": security, "resources": {"limits": devices or {}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }  # fmt: skip
    if "serve" in command:
        container["readinessProbe"] = {"httpGet": {"path": "/ready", "port": 8000}, "periodSeconds": 1, "timeoutSeconds": 5}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": user, "runAsGroup": user, "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }  # fmt: skip
