"""The Grafana dashboard asks for metrics and labels that the server has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from gantline_runtime.engine_messages import EngineReport
from gantline_runtime.server.lifecycle import State
from gantline_runtime.server.metrics import Metrics

from tests.operator.helm import render
from tests.runtime.server_process import ROOT

BOARD = json.loads((ROOT / "charts/gantline/dashboards/serving.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in BOARD["panels"] for target in panel["targets"]]
OF_THE_SCRAPE = {"namespace", "pod", "le"}


def _series() -> dict[str, set[str]]:
    """Every name that /metrics shows, with its labels."""
    metrics = Metrics("0")
    metrics.engine(EngineReport(step_times={"schedule": 0.0}, promised_bytes={"weights": 0}, reserved_bytes={"weights": 0}))
    metrics.http("/health", "GET", 200)
    metrics.startup("weights", 0.0)
    text = metrics.render(State.READY).decode()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, labels = line.rpartition(" ")[0].partition("{")
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_every_query_names_metrics_and_labels_that_exist(title: str, query: str) -> None:
    series = _series()
    names = re.findall(r"gantline_\w+", query)
    assert names and set(names) <= set(series), title
    selected = {label for group in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)=", group)}
    grouped = {label for group in re.findall(r"(?:by|ignoring) \(([^)]*)\)", query) for label in re.split(r",\s*", group)}
    assert selected | grouped <= OF_THE_SCRAPE.union(*(series[name] for name in names)), title
    assert query.count("(") == query.count(")")


def test_counters_are_shown_as_rates_and_gauges_never_are() -> None:
    for _, query in QUERIES:
        for rated, name in re.findall(r"(rate\()?(gantline_\w+)", query):
            assert bool(rated) == name.endswith(("_total", "_bucket")), query


def test_the_file_is_what_its_table_says() -> None:
    done = subprocess.run([sys.executable, "scripts/dashboard.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_panels_do_not_lie_over_each_other_and_fit_the_page() -> None:
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in BOARD["panels"]]
    assert len(set(places)) == len(places) and all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in BOARD["panels"])
    assert len({p["id"] for p in BOARD["panels"]}) == len(places)


def test_the_chart_installs_it_only_when_asked_with_the_sidecars_label() -> None:
    def boards(values: dict[str, Any]) -> list[dict[str, Any]]:
        return [item for item in render(values) if item["kind"] == "ConfigMap" and item["metadata"]["name"].endswith("-dashboard")]

    assert boards({}) == []
    (made,) = boards({"dashboard": {"enabled": True}})
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(made["data"]["gantline-serving.json"]) == BOARD
    assert len(yaml.safe_dump(made)) < 900_000, "a ConfigMap holds at most 1 MiB"
