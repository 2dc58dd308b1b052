"""`make quickstart`: from a bare machine to a streamed answer, phase by phase.

Embedded (default): builds Kubernetes' parts, starts one real node in namespaces of its own, installs the chart, applies the example.
Elsewhere (--kubeconfig and --image-repository): builds and pushes the images, then the same chart and the same example.
Run again, it picks up where things stand: every phase first looks whether its work is done.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / ".quickstart"
NAMESPACE = "gantline-system"
EXAMPLE = ROOT / "examples/quickstart.yaml"
SERVICE = "chat"
GATEWAY = "gantline-gateway"
QUESTION = "What does os.path.join do?"
READY_TIMEOUT_S = 600
GATEWAY_TIMEOUT_S = 60
"""A gateway with long streams to finish is not waited for any longer."""
WORKS = {"Fetching": "fetch", "Quantizing": "quantize", "Starting": "server"}
"""Reason of Ready -> the role of the pod whose log tells how far the work is."""
LOOK_EVERY_S = 1.0
"""A look at the service takes a tenth of a second of processor time, which the work needs as well."""
LOOK_INTO_LOGS_EVERY = 3
"""Looks at the service."""
DEVELOPMENT_IMAGES = {"operator": "localhost/gantline-operator:dev", "cpu": "localhost/gantline-runtime-cpu:dev"}


class PhaseFailed(Exception):
    """One phase could not do its work; `log` is where its output lies."""

    def __init__(self, why: str, log: Path | None = None) -> None:
        super().__init__(why)
        self.log = log


@dataclass
class Ticker:
    """Prints one phase: what it does, for how long it has, and its latest detail."""

    number: int
    total: int
    title: str
    started: float = field(default_factory=time.monotonic)
    detail: str = ""
    _shown: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Ticker:
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._print(f"{'✓' if kind is None else '✗'} {self._head()}", last=True)

    def _head(self) -> str:
        return f"[{self.number}/{self.total}] {self.title}  {time.monotonic() - self.started:.0f} s"

    def _tick(self) -> None:
        interval = 0.5 if sys.stdout.isatty() else 10.0
        while True:
            line = f"… {self._head()}  {self.detail}"
            if sys.stdout.isatty() or self.detail != self._shown:
                self._shown = self.detail
                self._print(line)
            if self._stop.wait(interval):
                return

    def _print(self, line: str, last: bool = False) -> None:
        if not sys.stdout.isatty():
            print(line, flush=True)
            return
        width = shutil.get_terminal_size().columns
        print(f"\r\033[K{line[: width - 1]}", end="\n" if last else "", flush=True)


@dataclass(frozen=True)
class Tools:
    """The programs and the cluster that the phases work with."""

    kubectl: str
    helm: str
    kubeconfig: Path
    images: dict[str, str]
    embedded: bool

    def environment(self) -> dict[str, str]:
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig)}

    def run(self, *command: str, log: str, ticker: Ticker | None = None) -> str:
        return run(list(command), log=log, ticker=ticker, environment=self.environment())

    def get(self, *arguments: str) -> Any:
        """The JSON of `kubectl get ARGUMENTS`, or None where there is no such object."""
        command = [self.kubectl, "get", *arguments, "-o", "json", "--ignore-not-found"]
        answer = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
        if answer.returncode:
            raise PhaseFailed(answer.stderr.strip().splitlines()[-1] if answer.stderr.strip() else "kubectl get failed")
        return json.loads(answer.stdout) if answer.stdout.strip() else None


def run(command: list[str], *, log: str, ticker: Ticker | None = None, environment: dict[str, str] | None = None) -> str:
    """Run `command`, its output into a log of its own and its last line into the ticker. Raises PhaseFailed."""
    path = STATE / "logs" / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with path.open("a") as file, subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            lines.append(line)
            if ticker and line.strip():
                ticker.detail = line.strip()
    if process.returncode:
        tail = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
        raise PhaseFailed(tail, path)
    return "".join(lines)


def embedded_cluster(tick: Callable[[str], Ticker]) -> Tools:
    module = [sys.executable, "-m", "gantline_devcluster"]
    with tick("build Kubernetes' parts (once for each version)") as ticker:
        binaries = Path(run([*module, "build", "--set", "node"], log="build", ticker=ticker).strip().splitlines()[-1])
    with tick("start a node of our own, in its own namespaces") as ticker:
        kubeconfig = Path(run([*module, "up"], log="up", ticker=ticker).strip().rpartition("export KUBECONFIG=")[2])
    return Tools(str(binaries / "kubectl"), str(binaries / "helm"), kubeconfig, DEVELOPMENT_IMAGES, embedded=True)


# Docker's image format for all of them: OCI's has no health check.
BUILDERS = {
    "docker": ["build"],
    "podman": ["build", "--format", "docker"],
    "buildah": ["build", "--layers", "--format", "docker"],
}


def find_builder() -> str:
    """The first of docker, podman and buildah that works; a docker without its engine does not. Raises PhaseFailed."""
    installed = [name for name in BUILDERS if shutil.which(name)]
    for name in installed:
        if subprocess.run([name, "info"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0:
            return name
    if installed:
        raise PhaseFailed(f"the cluster's nodes need images, and {' and '.join(installed)} cannot build: `{installed[0]} info` says why")
    raise PhaseFailed("none of docker, podman and buildah is installed, and the cluster's nodes need images: install one of them")


def build_image(builder: str, target: str, repository: str, ticker: Ticker) -> str:
    """Build and push one target of the Dockerfile; returns the image's name, whose tag changes with its content.

    So a node that has yesterday's image pulls today's, and helm sees that there is something to roll out.
    """
    plain = f"{repository}/{target}:{version()}"
    run([builder, *BUILDERS[builder], "--target", target, "--tag", plain, "."], log="images", ticker=ticker)
    digest = run([builder, "images", "--quiet", "--no-trunc", plain], log="images").strip().removeprefix("sha256:")
    image = f"{plain}-{digest[:12]}"
    run([builder, "tag", plain, image], log="images", ticker=ticker)
    run([builder, "push", image], log="images", ticker=ticker)
    return image


CLIENTS = ("kubectl", "helm")


def given_cluster(tick: Callable[[str], Ticker], kubeconfig: Path, repository: str) -> Tools:
    builder = find_builder()
    images = {}
    for role, target in (("operator", "operator"), ("cpu", "runtime-cpu")):
        with tick(f"build and push {repository}/{target} with {builder}") as ticker:
            images[role] = build_image(builder, target, repository, ticker)
    found = {name: shutil.which(name) for name in CLIENTS}
    if not all(found.values()):
        module = [sys.executable, "-m", "gantline_devcluster"]
        with tick("build kubectl and helm") as ticker:
            run([*module, "build", "--set", "client"], log="build", ticker=ticker)
        binaries = Path(run([*module, "binaries"], log="build").strip().splitlines()[-1])
        found = {name: str(binaries / name) for name in found}
    return Tools(str(found["kubectl"]), str(found["helm"]), kubeconfig.absolute(), images, embedded=False)


def version() -> str:
    import tomllib

    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def install_chart(tools: Tools, ticker: Ticker) -> None:
    values = {
        "image": dict(zip(("repository", "tag"), tools.images["operator"].rsplit(":", 1), strict=True)),
        "runtime": {"images": {"cpu": tools.images["cpu"]}},
        "gateway": {"replicas": 1 if tools.embedded else 2},
    }
    file = STATE / "values.json"
    file.write_text(json.dumps(values))
    tools.run(
        tools.helm, "upgrade", "--install", "gantline", "charts/gantline", "--namespace", NAMESPACE, "--create-namespace",
        "--values", str(file), "--wait", "--timeout", "5m", log="helm", ticker=ticker,
    )  # fmt: skip
    wait_until_alone(tools, ticker)


def wait_until_alone(tools: Tools, ticker: Ticker) -> None:
    """Until gateways that this installation replaced are gone: they may have other settings, and be asked for a moment yet."""
    deadline = time.monotonic() + GATEWAY_TIMEOUT_S
    marks = ("-n", NAMESPACE, "-l", "app.kubernetes.io/component=gateway")
    while any("deletionTimestamp" in pod["metadata"] for pod in tools.get("pods", *marks)["items"]) and time.monotonic() < deadline:
        ticker.detail = "a gateway that was replaced finishes what it has"
        time.sleep(0.2)


def wait_until_ready(tools: Tools, ticker: Ticker) -> None:
    """Follow the service's conditions until Ready, showing what it waits for and the progress of its Job."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    for turn in itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.count()):
        service = tools.get("gisvc", SERVICE)
        conditions = {c["type"]: c for c in (service or {}).get("status", {}).get("conditions", [])}
        ready = conditions.get("Ready", {})
        if ready.get("status") == "True" and ready.get("observedGeneration") == service["metadata"]["generation"]:
            return
        refused = next((c for c in conditions.values() if is_final(c)), None)
        if refused:
            raise PhaseFailed(f"{refused['type']} is False, {refused['reason']}: {refused['message']}", save_state(tools))
        if turn % LOOK_INTO_LOGS_EVERY == 0:
            ticker.detail = progress(tools, ready)
        time.sleep(LOOK_EVERY_S)
    raise PhaseFailed(f"the service was not Ready within {READY_TIMEOUT_S} s; last: {ticker.detail}", save_state(tools))


FINAL_REASONS = {
    "NoMatchingGPU", "ModelTooLarge", "NoRuntimeImage", "UnsupportedArchitecture", "NotAModel", "ModelNotFound", "InvalidCheckpoint",
    "UnsafeWeights", "QualityGateFailed", "InvalidQuantization", "InvalidSpec",
}  # fmt: skip


def is_final(condition: dict[str, Any]) -> bool:
    stage = condition["type"] in ("PlanResolved", "ModelReady", "QuantizationReady")
    return bool(stage and condition["status"] == "False" and condition["reason"] in FINAL_REASONS)


def progress(tools: Tools, ready: dict[str, Any]) -> str:
    """What the service waits for, and how far the pod is that works for it."""
    waiting = f"{ready.get('reason', 'waiting')}: {ready.get('message', '')}".strip(": ")
    role = WORKS.get(ready.get("reason", ""))
    if role is None:
        return waiting
    command = [tools.kubectl, "logs", "-l", f"gantline.io/service={SERVICE},gantline.io/role={role}", "--tail=1"]
    tail = subprocess.run(command, env=tools.environment(), capture_output=True, text=True, timeout=60)
    last = tail.stdout.strip().replace("\r", "\n").splitlines()
    return bar(last[-1]) or waiting if last else waiting


def bar(line: str) -> str:
    """A log line of ours with its progress as a bar; "" for a line that tells of none."""
    try:
        entry = json.loads(line)
        share = min(1.0, max(0.0, float(entry["progress"])))
    except (ValueError, KeyError, TypeError):
        return ""
    filled = round(24 * share)
    left = f", {entry['eta_s']} s left" if "eta_s" in entry else ""
    return f"[{'#' * filled}{'.' * (24 - filled)}] {share:4.0%} {entry.get('phase', entry.get('message', ''))}{left}"


def save_state(tools: Tools) -> Path:
    """What a person would look at next, in one file."""
    path = STATE / "logs" / "state.log"
    with path.open("w") as file:
        for command in (
            ["describe", "gisvc", SERVICE],
            ["get", "pods,jobs,pvc", "-A", "-o", "wide"],
            ["get", "events", "--sort-by=.lastTimestamp"],
            ["logs", "-n", NAMESPACE, "deployment/gantline", "--tail=200"],
            ["logs", "-n", NAMESPACE, f"deployment/{GATEWAY}", "--tail=200"],
        ):
            subprocess.run([tools.kubectl, *command], env=tools.environment(), stdout=file, stderr=subprocess.STDOUT, timeout=60)
    return path


@contextlib.contextmanager
def address(tools: Tools) -> Iterator[str]:
    """A loopback address of the gateway: relayed by the embedded cluster, or a port-forward for as long as it is used."""
    if tools.embedded:
        module = [sys.executable, "-m", "gantline_devcluster"]
        port = run([*module, "expose", f"{NAMESPACE}/{GATEWAY}:80"], log="expose").strip().splitlines()[-1].rsplit(":", 1)[-1]
        yield f"http://127.0.0.1:{port}"
        return
    command = [tools.kubectl, "port-forward", "--namespace", NAMESPACE, f"service/{GATEWAY}", ":80"]
    with subprocess.Popen(command, env=tools.environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().split("->")[0].rsplit(":", 1)[-1].strip()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def opened(request: urllib.request.Request) -> http.client.HTTPResponse:
    """The answer; for a while nobody may be there yet, since an address follows its pods' readiness a moment later."""
    deadline = time.monotonic() + GATEWAY_TIMEOUT_S
    while True:
        try:
            return cast(http.client.HTTPResponse, urllib.request.urlopen(request, timeout=120))
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def ask(base: str) -> None:
    """One chat request, its answer printed as it streams."""
    body = {"model": SERVICE, "messages": [{"role": "user", "content": QUESTION}], "stream": True, "max_tokens": 80, "temperature": 0}
    request = urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    print(f"\n  you   {QUESTION}\n  chat  ", end="", flush=True)
    words = 0
    with opened(request) as stream:
        for raw in stream:
            line = raw.decode().strip()
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                if "error" in event:
                    raise PhaseFailed(f"the stream ended with an error: {event['error']['message']}")
                text = "".join(c.get("delta", {}).get("content") or "" for c in event.get("choices", []))
                words += bool(text)
                print(text.replace("\n", "\n        "), end="", flush=True)
    print("\n")
    if not words:
        raise PhaseFailed("the service answered with no text")


def write_environment(tools: Tools) -> Path:
    """A file to source, so that the commands printed at the end work from the user's own shell."""
    path = STATE / "env"
    folders = ":".join(dict.fromkeys(str(Path(p).parent) for p in (tools.kubectl, tools.helm)))
    path.write_text(f'export KUBECONFIG="{tools.kubeconfig}"\nexport PATH="{folders}:$PATH"\n')
    return path


def print_next(tools: Tools, base: str) -> None:
    where = write_environment(tools).relative_to(ROOT)
    forwarded = "" if tools.embedded else f"  kubectl port-forward -n {NAMESPACE} service/{GATEWAY} {base.rsplit(':', 1)[-1]}:80 &\n"
    print(
        f"Try next (the first line once in each shell):\n"
        f"  source {where}\n"
        f"  kubectl get gisvc\n"
        f"  kubectl describe gisvc {SERVICE}\n"
        f"  kubectl explain gisvc.spec.engine\n"
        f"  kubectl scale gisvc/{SERVICE} --replicas=2\n"
        f"  kubectl logs deployment/{SERVICE}\n"
        f"  kubectl logs -n {NAMESPACE} deployment/gantline\n{forwarded}"
        f"  curl -s {base}/v1/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{SERVICE}", "prompt": "The licence", "max_tokens": 24}}\'\n'
        f"  curl -s {base}/v1/models\n" + ("  make down\n" if tools.embedded else f"  kubectl delete -f {EXAMPLE.relative_to(ROOT)}\n")
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kubeconfig", type=Path, help="use this cluster instead of an embedded one (make quickstart KUBECONFIG=...)")
    parser.add_argument("--image-repository", help="where its nodes pull our images from (IMAGE_REPOSITORY=...)")
    options = parser.parse_args(arguments)
    if options.kubeconfig and not options.image_repository:
        print("gantline: another cluster needs IMAGE_REPOSITORY=... too: you push to it, its nodes pull from it.", file=sys.stderr)
        return 2
    if options.image_repository and not options.kubeconfig:
        print("gantline: IMAGE_REPOSITORY=... goes with KUBECONFIG=..., the cluster that shall pull from it.", file=sys.stderr)
        return 2
    STATE.mkdir(exist_ok=True)
    shutil.rmtree(STATE / "logs", ignore_errors=True)
    started, numbers = time.monotonic(), iter(range(1, 100))
    total = 7 if options.kubeconfig and not all(map(shutil.which, CLIENTS)) else 6
    current = ""

    def tick(title: str) -> Ticker:
        nonlocal current
        current = title
        return Ticker(next(numbers), total, title)

    try:
        tools = given_cluster(tick, options.kubeconfig, options.image_repository) if options.kubeconfig else embedded_cluster(tick)
        with tick("install the chart") as ticker:
            install_chart(tools, ticker)
        with tick(f"apply {EXAMPLE.relative_to(ROOT)}"):
            tools.run(tools.kubectl, "apply", "-f", str(EXAMPLE), log="apply")
        with tick("inspect, quantize, load") as ticker:
            wait_until_ready(tools, ticker)
        with address(tools) as base:
            with tick("ask"):
                pass
            ask(base)
            print(f"From nothing to this answer: {time.monotonic() - started:.0f} s.\n")
            print_next(tools, base)
    except PhaseFailed as failure:
        print(f"gantline: '{current}' failed: {failure}", file=sys.stderr)
        print(f"gantline: its log: {failure.log or STATE / 'logs'}", file=sys.stderr)
        return 1
    except (OSError, subprocess.SubprocessError) as failure:
        print(f"gantline: '{current}' failed: {failure}\ngantline: its log: {STATE / 'logs'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
