"""What every step of the rehearsal works with: the cluster, commands and their output, waiting, and the figures."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gantline_devcluster.node.cluster import NodeCluster

__all__ = ["GATEWAYS", "NAMESPACE", "ROOT", "SERVERS", "Rehearsal", "RehearsalFailed"]

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "gantline-system"
SERVERS = "gantline.io/service=chat,gantline.io/role=server"
GATEWAYS = "app.kubernetes.io/component=gateway"
LIMIT_S = 3600.0
Object = dict[str, Any]


class RehearsalFailed(Exception):
    """One step did not do what it must."""


@dataclass
class Rehearsal:
    """The cluster, the environment of every command, and what was measured: (what, figure), in order."""

    cluster: NodeCluster
    environment: dict[str, str]
    figures: list[tuple[str, str]] = field(default_factory=list)
    runtime_image: str = ""
    """The image for GPUs, once it is built."""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"… {title}", flush=True)
        started = time.monotonic()
        yield
        load = Path("/proc/loadavg").read_text().split()[0]
        took = f"{time.monotonic() - started:.1f} s (load {load})"
        print(f"✓ {title}  {took}", flush=True)
        self.figures.append((title, took))

    def run(self, *command: str, check: bool = True, stdin: str | None = None, timeout_s: float = LIMIT_S) -> str:
        """The command's standard output. Raises RehearsalFailed with that and standard error, where warnings are at other times."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )  # fmt: skip
        if check and done.returncode:
            raise RehearsalFailed(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def succeeds(self, *command: str) -> bool:
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, timeout=LIMIT_S, check=False).returncode == 0

    def helm(self, *arguments: str) -> str:
        """Of the release, in its namespace."""
        verb, *rest = arguments
        return self.run("helm", verb, "gantline", *rest, "--namespace", NAMESPACE)

    def apply(self, manifest: Object) -> None:
        self.run("kubectl", "apply", "-f", "-", stdin=json.dumps(manifest))

    def get(self, *arguments: str) -> Any:
        """The object or list, None where there is none."""
        text = self.run("kubectl", "get", *arguments, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def pods(self, selector: str, namespace: str = "default") -> list[Object]:
        return list((self.get("pods", "-l", selector, "-n", namespace) or {}).get("items", []))

    def serving_pods(self) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self.pods(SERVERS)}

    def condition(self, name: str, kind: str) -> Object:
        conditions = self.get("gisvc", name).get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def ready(self, replicas: int) -> bool:
        """Whether the example's service is Ready as its spec is now, with so many replicas."""
        service = self.get("gisvc", "chat")
        condition: Object = next((c for c in service["status"].get("conditions", []) if c["type"] == "Ready"), {})
        current = condition.get("observedGeneration") == service["metadata"]["generation"]
        return bool(current and condition["status"] == "True" and service["status"].get("readyReplicas") == replicas)

    def until(self, claim: str, holds: Callable[[], Any], timeout_s: float = 300) -> None:
        """Raises RehearsalFailed with the cluster's state where it does not hold in time."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                state = self.run("kubectl", "get", "gisvc,pods,jobs,pvc,events", "-A", "-o", "wide", check=False)
                raise RehearsalFailed(f"within {timeout_s:.0f} s it was not so that {claim}\n{state}")
            time.sleep(0.5)
