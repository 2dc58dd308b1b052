"""`make rehearsal`: what `make quickstart` does on a cluster of one's own, with images built from the Dockerfile, from end to end.

A node without development images (`gantline_devcluster up --built-images`) and its registry; buildah; then apply, quantize, serve, stream,
`helm upgrade`, `helm test`, roll out, scale, share a GPU, delete, `helm uninstall`. What it measured is printed at the end. Needs root and
Debian's packages; takes minutes, and about 15 GB in the cache the first time. Not part of `make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gantline_devcluster import profiles
from gantline_devcluster.cache import cache_root
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.node.cluster import NodeCluster
from quickstart import BUILDERS

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".quickstart"
NAMESPACE = "gantline-system"
NAME = "rehearsal"
GPU = "nvidia.com/gpu"
SERVERS = "gantline.io/service=chat,gantline.io/role=server"
# What the machine says about certificates and package indexes is true inside a build as well; nothing of it gets into an image.
MACHINE_SETTINGS = ("/etc/ssl/certs", "/etc/pip.conf")
PACKAGES = {"buildah": "buildah", "mmdebstrap": "mmdebstrap"}
LIMIT_S = 1800.0


class RehearsalFailed(Exception):
    """One step did not do what it must."""


@dataclass
class Rehearsal:
    """The cluster, the environment of every command, and what was measured: (what, figure), in order."""

    cluster: NodeCluster
    environment: dict[str, str]
    figures: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"… {title}", flush=True)
        started = time.monotonic()
        yield
        took = f"{time.monotonic() - started:.1f} s"
        print(f"✓ {title}  {took}", flush=True)
        self.figures.append((title, took))

    def run(self, *command: str, check: bool = True, stdin: str | None = None, timeout_s: float = LIMIT_S) -> str:
        """The command's output, standard error after it. Raises RehearsalFailed with all of it."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )  # fmt: skip
        if check and done.returncode:
            raise RehearsalFailed(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr

    def succeeds(self, *command: str) -> bool:
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, timeout=LIMIT_S, check=False).returncode == 0

    def get(self, *arguments: str) -> Any:
        text = self.run("kubectl", "get", *arguments, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def pods(self, selector: str) -> list[dict[str, Any]]:
        return list((self.get("pods", "-l", selector) or {}).get("items", []))

    def until(self, claim: str, holds: Callable[[], Any], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                state = self.run("kubectl", "get", "gisvc,pods,jobs,pvc,events", "-A", "-o", "wide", check=False)
                raise RehearsalFailed(f"within {timeout_s:.0f} s it was not so that {claim}\n{state}")
            time.sleep(0.5)


# --- before the cluster: a builder that finds its way ------------------------------------------------------------------------------------


def install_packages() -> None:
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise RehearsalFailed(f"{' and '.join(missing)} are needed: install them with this system's package manager")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        subprocess.run(["apt-get", "--quiet", *command], env=environment, check=True, stdout=subprocess.DEVNULL)


def builder_environment(folder: Path, registry: str) -> dict[str, str]:
    """Settings of buildah in files of their own: where images lie, what of the machine a build sees, and that our registry speaks HTTP."""
    folder.mkdir(parents=True, exist_ok=True)
    store = str(cache_root() / "images")
    shown = [f"{path}:{path}:ro" for path in MACHINE_SETTINGS if Path(path).exists()]
    files = {
        "storage.conf": f'[storage]\ndriver = "overlay"\ngraphroot = {json.dumps(store)}\nrunroot = {json.dumps(store + "/run")}\n',
        "containers.conf": f"[containers]\nvolumes = {json.dumps(shown)}\n",
        "registries.conf": f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
        "BUILDAH_ISOLATION": "chroot",  # runs where the kernel's tools for more are missing; the network is the machine's
    }


def base_image() -> str:
    return "python:" + re.findall(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)[0]


def provide_base(rehearsal: Rehearsal) -> None:
    """Pull the Dockerfile's base, or put a stand-in together where that cannot be."""
    base = base_image()
    if rehearsal.succeeds("buildah", "inspect", "--type", "image", base):
        return
    if not rehearsal.succeeds("buildah", "pull", "--quiet", base):
        print(f"  {base} cannot be pulled here: its stand-in is put together from Debian packages", flush=True)
        rehearsal.run("scripts/base_image.sh")


# --- the path -----------------------------------------------------------------------------------------------------------------------------


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


def images_of(rehearsal: Rehearsal) -> dict[str, str]:
    """Target -> the image that the cluster runs."""
    values = json.loads((STATE / "values.json").read_text())
    return {"operator": f"{values['image']['repository']}:{values['image']['tag']}", "runtime-cpu": values["runtime"]["images"]["cpu"]}


def record_sizes(rehearsal: Rehearsal) -> None:
    """Each image unpacked, as its layers are pulled, and how long the node took to pull and unpack it."""
    for target, image in images_of(rehearsal).items():
        layers = pushed_layers(rehearsal, image)
        packed = sum(layer["size"] for layer in layers)
        unpacked = rehearsal.run("buildah", "images", "--format", "{{.Size}}", image).splitlines()[0]  # a line for each tag
        rehearsal.figures.append((f"image {target}", f"{unpacked} unpacked, {packed / 1e6:.0f} MB to pull in {len(layers)} layers"))
    for event in rehearsal.get("events", "-A", "--field-selector=reason=Pulled")["items"]:
        if found := re.search(r'pulled image "(\S+)" in (\S+)', event["message"]):
            rehearsal.figures.append((f"pull {found[1].split('/')[-1].split(':')[0]}, unpacking included", found[2]))


def pushed_layers(rehearsal: Rehearsal, image: str) -> list[dict[str, Any]]:
    """The layers in the image's manifest as the registry has it, their sizes compressed."""
    name, tag = image.removeprefix(f"{rehearsal.cluster.registry}/").rsplit(":", 1)
    accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
    request = urllib.request.Request(f"http://{rehearsal.cluster.registry}/v2/{name}/manifests/{tag}", headers=accept)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return list(json.load(answer)["layers"])


def record_readiness(rehearsal: Rehearsal) -> None:
    """Of the first serving pod, whose image is on the node by then: from its creation to Ready."""
    pod = rehearsal.pods(SERVERS)[0]
    ready_at = next(c["lastTransitionTime"] for c in pod["status"]["conditions"] if c["type"] == "Ready")
    seconds = (datetime.fromisoformat(ready_at) - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
    rehearsal.figures.append(("serving pod, from created to Ready, image on the node", f"{seconds:.0f} s"))


def run_as_anyone(rehearsal: Rehearsal) -> None:
    """Each image as a user that it has never heard of, its root read-only, nothing to write to but a /tmp."""
    commands = {
        "operator": ["gantline-operator", "--help"],
        "runtime-cpu": ["gantline", "generate", "/opt/gantline/tiny-model", "What does os.path.join do?", "--max-tokens", "8"],
    }
    for target, image in images_of(rehearsal).items():
        run_pod(rehearsal, lone_pod(f"anyone-{target}", image, commands[target], random.randrange(100_000, 2_000_000_000)))


def run_pod(rehearsal: Rehearsal, pod: dict[str, Any]) -> str:
    """Run it to its end, remove it, and return what it wrote. Raises RehearsalFailed with its log where it does not succeed."""
    name = f"pod/{pod['metadata']['name']}"
    rehearsal.run("kubectl", "apply", "-f", "-", stdin=json.dumps(pod))
    rehearsal.until(f"{name} ended", lambda: rehearsal.get(name)["status"]["phase"] in ("Succeeded", "Failed"))
    log = rehearsal.run("kubectl", "logs", name)
    if rehearsal.get(name)["status"]["phase"] != "Succeeded" or not log.strip():
        raise RehearsalFailed(f"{name} failed as user {pod['spec']['securityContext']['runAsUser']} with a read-only root:\n{log}")
    rehearsal.run("kubectl", "delete", name, "--grace-period=1")
    return log


def lone_pod(name: str, image: str, command: list[str], user: int, devices: dict[str, str] | None = None) -> dict[str, Any]:
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "main", "image": image, "command": command, "securityContext": security, "resources": {"limits": devices or {}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }  # fmt: skip
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


def ready(rehearsal: Rehearsal, replicas: int) -> bool:
    service = rehearsal.get("gisvc", "chat")
    conditions = {c["type"]: c for c in service["status"].get("conditions", [])}
    current = conditions.get("Ready", {}).get("observedGeneration") == service["metadata"]["generation"]
    return current and conditions["Ready"]["status"] == "True" and service["status"].get("readyReplicas") == replicas


def serving_pods(rehearsal: Rehearsal) -> set[str]:
    return {p["metadata"]["uid"] for p in rehearsal.pods(SERVERS)}


def upgrade_chart(rehearsal: Rehearsal) -> None:
    before = serving_pods(rehearsal)
    changed = ("operator.logLevel=debug", f"runtime.images.cuda={images_of(rehearsal)['runtime-cpu']}")
    rehearsal.run(
        "helm", "upgrade", "gantline", "charts/gantline", "--namespace", NAMESPACE, "--values", str(STATE / "values.json"),
        "--set", ",".join(changed), "--wait", "--timeout", "5m",
    )  # fmt: skip
    rehearsal.until("the service is Ready under the upgraded operator", lambda: ready(rehearsal, 1))
    if serving_pods(rehearsal) != before:
        raise RehearsalFailed("the upgrade of the chart replaced serving pods")


def roll_out(rehearsal: Rehearsal) -> None:
    before = serving_pods(rehearsal)
    patch = json.dumps({"spec": {"engine": {"maxBatchSize": 8}}})
    rehearsal.run("kubectl", "patch", "gisvc", "chat", "--type=merge", "--patch", patch)
    rehearsal.until("the new revision is Ready", lambda: ready(rehearsal, 1))
    if serving_pods(rehearsal) & before:
        raise RehearsalFailed("a changed engine setting replaced no pod")


def scale(rehearsal: Rehearsal) -> None:
    for replicas in (2, 1):
        rehearsal.run("kubectl", "scale", "gisvc/chat", f"--replicas={replicas}")
        rehearsal.until(f"{replicas} replicas are ready", lambda replicas=replicas: ready(rehearsal, replicas))


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
    rehearsal.run("kubectl", "apply", "-f", "-", stdin=json.dumps(gpu_service("first")))
    fault = lambda: condition(rehearsal, "first", "Ready").get("message", "")
    rehearsal.until("the first names the GPU's fault", lambda: "torch sees no GPU" in fault())
    rehearsal.run("kubectl", "apply", "-f", "-", stdin=json.dumps(gpu_service("second")))
    scheduled = lambda: condition(rehearsal, "second", "Scheduled")
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


def condition(rehearsal: Rehearsal, name: str, kind: str) -> dict[str, Any]:
    conditions = rehearsal.get("gisvc", name).get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def remove(rehearsal: Rehearsal) -> None:
    rehearsal.run("kubectl", "delete", "-f", "examples/quickstart.yaml", "--timeout=120s")
    rehearsal.until("no pod of the service is left", lambda: not rehearsal.pods("gantline.io/service=chat"))
    rehearsal.run("helm", "uninstall", "gantline", "--namespace", NAMESPACE, "--wait", "--timeout", "2m")
    if not rehearsal.get("crd", "inferenceservices.gantline.io"):
        raise RehearsalFailed("helm uninstall took the CustomResourceDefinition, and with it every service, away")


def rebuild(rehearsal: Rehearsal) -> None:
    """The same builds after a change of one line of the runtime's code, in a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="gantline-") as folder:
        names = rehearsal.run("git", "ls-files", "-z").split("\0")
        for name in filter(None, names):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)
        with (Path(folder) / "runtime/gantline_runtime/__init__.py").open("a") as file:
            file.write(f"# changed at {time.time()}\n")
        for target, image in images_of(rehearsal).items():
            with rehearsal.step(f"build {target} again after a change of one line"):
                rehearsal.run("buildah", *BUILDERS["buildah"], "--target", target, "--tag", f"changed/{target}", folder)
            if image_id(rehearsal, f"changed/{target}") == image_id(rehearsal, image):
                raise RehearsalFailed(f"the change is not in the image {target}: the builder took a layer from its cache that it must not")
            rehearsal.run("buildah", "rmi", f"changed/{target}")


def image_id(rehearsal: Rehearsal, image: str) -> str:
    return rehearsal.run("buildah", "images", "--quiet", "--no-trunc", image).strip()


def rehearse(rehearsal: Rehearsal) -> None:
    with rehearsal.step("the Dockerfile's base"):
        provide_base(rehearsal)
    with rehearsal.step("make quickstart KUBECONFIG=... IMAGE_REPOSITORY=..."):
        quickstart(rehearsal)
    record_sizes(rehearsal)
    record_readiness(rehearsal)
    steps: tuple[tuple[str, Callable[[Rehearsal], None]], ...] = (
        ("each image as a user of its own number, with a read-only root", run_as_anyone),
        ("helm upgrade, without touching a serving pod", upgrade_chart),
        ("helm test", lambda r: void(r.run("helm", "test", "gantline", "--namespace", NAMESPACE, "--timeout", "8m"))),
        ("roll out a changed setting", roll_out),
        ("scale to 2 and back", scale),
        ("two services for one GPU, one after the other", share_one_gpu),
        ("delete the service, helm uninstall", remove),
    )
    for title, action in steps:
        with rehearsal.step(title):
            action(rehearsal)
    rebuild(rehearsal)


def void(_: object) -> None:
    """For an action whose answer nobody needs."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the cluster running, to look at it; `--name rehearsal down` removes it")
    options = parser.parse_args()
    cluster = NodeCluster(NAME)
    try:
        install_packages()
        started = time.monotonic()
        cluster.up(built_images=True)
        binaries = subprocess.run([sys.executable, "-m", "gantline_devcluster", "binaries"], capture_output=True, text=True, check=True)
        environment = {
            **os.environ, **builder_environment(cache_root() / "rehearsal", cluster.registry), "KUBECONFIG": str(cluster.kubeconfig),
            "PATH": f"{binaries.stdout.strip()}:{os.environ['PATH']}",
        }  # fmt: skip
        rehearsal = Rehearsal(cluster, environment, [("a node and its registry", f"{time.monotonic() - started:.1f} s")])
        rehearse(rehearsal)
    except (RehearsalFailed, DevclusterError, OSError, subprocess.SubprocessError) as failure:
        print(f"gantline: the rehearsal failed: {failure}", file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            cluster.down()
    print("\n".join(["", *(f"{what:64} {figure}" for what, figure in rehearsal.figures)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
