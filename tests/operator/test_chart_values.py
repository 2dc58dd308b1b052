"""`helm upgrade --reuse-values`, which brings the values of the installed chart instead of the new one's: younger values may be missing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_devcluster.api_only import ApiCluster

from tests.operator.helm import CHART, MINIMUM, render, run_helm
from tests.operator.record_release import FOLDER
from tests.operator.test_chart import INSTALLATIONS, of_kind

Object = dict[str, Any]
FIRST: Object = yaml.safe_load((FOLDER / "first-values.yaml").read_text())
"""values.yaml of the chart's first version. Kept for ever."""
NOW: Object = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: Object = yaml.safe_load((CHART / "values.schema.json").read_text())


def leaves(values: Object, schema: Object = SCHEMA, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, default) of each value; maps whose keys are a user's own are one value."""
    for name, value in values.items():
        below = schema["properties"][name]
        if below.get("properties"):
            yield from leaves(value, below, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def later_values() -> Object:
    text = (CHART / "templates/_values.tpl").read_text()
    found = re.search(r'define "gantline.laterValues" -}}\n(.+?)\n{{- end', text, re.S)
    assert found
    later: Object = yaml.safe_load(found[1])
    return later


def hollowed(values: Object, path: str = "") -> Object:
    """Without the later values, but with the maps that they lie in."""
    later = later_values()
    kept = {name: value for name, value in values.items() if f"{path}{name}" not in later}
    return {name: hollowed(value, f"{path}{name}.") if isinstance(value, dict) else value for name, value in kept.items()}


OLD = {"the-first": FIRST, "their-parents": hollowed(NOW)}


def chart_with(folder: Path, defaults: Object) -> Path:
    """The chart as Helm sees it under --reuse-values: today's templates, and the values that the installed one had."""
    chart = folder / "gantline"
    shutil.copytree(CHART, chart)
    (chart / "values.yaml").write_text(yaml.safe_dump(defaults))
    return chart


def test_every_value_that_the_first_chart_lacked_is_listed_with_its_default() -> None:
    first = dict(leaves(FIRST))
    assert later_values() == {path: value for path, value in leaves(NOW) if path not in first}
    assert first.keys() <= dict(leaves(NOW)).keys(), "the schema refuses a value that is gone, and so every upgrade that brings it"


def test_every_template_completes_the_values_before_it_reads_any() -> None:
    files = [path for path in (CHART / "templates").rglob("*") if path.is_file() and not path.name.startswith("_")]
    begin = '{{- include "gantline.completeValues" . -}}\n'
    assert files and not [path.name for path in files if not path.read_text().startswith(begin)]


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("name", INSTALLATIONS)
def test_old_values_render_as_new_ones_do(name: str, old: str, tmp_path: Path) -> None:
    given = {**MINIMUM, **INSTALLATIONS[name]}
    chart = chart_with(tmp_path, OLD[old])
    result = run_helm("template", "gantline", str(chart), "--namespace", "gantline-system", values=given)
    assert result.returncode == 0, result.stderr
    assert [item for item in yaml.safe_load_all(result.stdout) if item] == render(INSTALLATIONS[name])


def test_a_value_that_is_false_or_empty_stays_so(tmp_path: Path) -> None:
    chart = chart_with(
        tmp_path, {**FIRST, "gateway": {"enabled": True, "resources": {}}, "dashboard": {"enabled": True, "labels": {"a": "b"}}}
    )
    result = run_helm("template", "gantline", str(chart), values=MINIMUM)
    assert result.returncode == 0, result.stderr
    objects = [item for item in yaml.safe_load_all(result.stdout) if item]
    assert "grafana_dashboard" not in of_kind(objects, "ConfigMap", "gantline-dashboard")[0]["metadata"]["labels"]
    assert of_kind(objects, "Deployment", "gantline-gateway")[0]["spec"]["template"]["spec"]["containers"][0]["resources"] == {}
    off = run_helm("template", "gantline", str(chart), values={**MINIMUM, "gateway": {"enabled": False}})
    assert off.returncode == 0 and not of_kind(list(yaml.safe_load_all(off.stdout)), "Deployment", "gantline-gateway")


def test_an_installation_of_the_first_charts_values_is_upgraded_with_reuse_values(
    api_cluster: ApiCluster, namespace: str, tmp_path: Path
) -> None:
    """Twice, since the values of the first upgrade are what the second one reuses."""
    flags = ["--kubeconfig", str(api_cluster.kubeconfig), "--namespace", namespace, "--no-hooks"]
    installed = run_helm("install", "gantline", str(chart_with(tmp_path, FIRST)), *flags, values=MINIMUM)
    assert installed.returncode == 0, installed.stderr
    try:
        for replicas in (3, 4):
            upgraded = run_helm("upgrade", "gantline", str(CHART), "--reuse-values", "--set", f"gateway.replicas={replicas}", *flags)
            assert upgraded.returncode == 0, upgraded.stderr
            path = f"/apis/apps/v1/namespaces/{namespace}/deployments/gantline-gateway"
            assert api_cluster.client.get(path)["spec"]["replicas"] == replicas
    finally:
        run_helm("uninstall", "gantline", *flags)
