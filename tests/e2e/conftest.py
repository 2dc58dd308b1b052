"""The end-to-end tests go through the doors that a newcomer uses: `make quickstart`, kubectl, helm, HTTP, `make down`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 420


@dataclass(frozen=True)
class Site:
    """The cluster that `make quickstart` left behind, and what it printed."""

    output: str
    seconds: float
    url: str
    environment: dict[str, str]

    def run(self, *command: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, input=stdin, capture_output=True, text=True, timeout=LIMIT_S)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        return self.run("kubectl", *arguments, check=check, stdin=stdin).stdout

    def get(self, *arguments: str) -> Any:
        text = self.kubectl("get", *arguments, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def apply(self, manifest: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        service = self.get("gisvc", name) or {}
        conditions = service.get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def until(self, claim: str, holds: Callable[[], Any], seconds: float = 120) -> Any:
        """The first true value of `holds`, looked at each second. Fails with `claim` and the cluster's state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := holds():
                return value
            time.sleep(1)
        state = self.kubectl("get", "gisvc,pods,jobs,pvc", "-A", "-o", "wide", check=False) + self.kubectl("describe", "gisvc", check=False)
        logs = self.kubectl("logs", "-n", "gantline-system", "deployment/gantline", "--tail=40", check=False)
        pytest.fail(f"within {seconds} s it was not so that {claim}\n{state}\n{logs}")


def make(*arguments: str, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTEST", "KUBECONFIG"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("a node needs root: run `sudo make e2e`, or try KUBECONFIG= of any cluster")
    started = time.monotonic()
    done = make("quickstart")
    try:
        assert done.returncode == 0, f"make quickstart failed\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}\n{_logs()}"
        exported = dict(re.findall(r'^export (\w+)="(.*)"$', (ROOT / ".quickstart/env").read_text(), re.M))
        environment = {**os.environ, "KUBECONFIG": exported["KUBECONFIG"]}
        environment["PATH"] = exported["PATH"].replace("$PATH", os.environ["PATH"])
        url = re.findall(r"curl -s (http://127\.0\.0\.1:\d+)/", done.stdout)[0]
        yield Site(done.stdout, time.monotonic() - started, url, environment)
    finally:
        make("down", timeout=180)


def _logs() -> str:
    return "\n".join(f"--- {f.name}\n{f.read_text()[-2500:]}" for f in sorted((ROOT / ".quickstart/logs").glob("*.log")))
