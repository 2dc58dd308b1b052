"""Helm, for tests: the pinned binary, and a chart's rendered objects."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_devcluster.binaries import find
from gantline_devcluster.errors import DevclusterError

CHART = Path(__file__).resolve().parents[2] / "charts/gantline"
MINIMUM: dict[str, Any] = {"image": {"repository": "registry.example/operator"}}


def run_helm(*arguments: str, values: Any = None) -> subprocess.CompletedProcess[str]:
    """`helm ARGUMENTS --values -`; skips the test where Helm was never built, but not in CI, where `make test` builds it."""
    try:
        binary = find("helm")
    except DevclusterError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    given = ["--values", "-"] if values is not None else []
    return subprocess.run([str(binary), *arguments, *given], input=json.dumps(values), capture_output=True, text=True, timeout=60)


def render(
    values: Any = None, *, release: str = "gantline", namespace: str = "gantline-system", kinds: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """All objects of the chart, hooks included, for a cluster that knows these further `kinds` (group/version/kind)."""
    return copy.deepcopy(_rendered(json.dumps({**MINIMUM, **(values or {})}), release, namespace, kinds))


@functools.cache
def _rendered(values: str, release: str, namespace: str, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    known = [f"--api-versions={kind}" for kind in kinds]
    result = run_helm("template", release, str(CHART), "--namespace", namespace, *known, values=json.loads(values))
    assert result.returncode == 0, result.stderr
    return [item for item in yaml.load_all(result.stdout, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if item]
