"""The Grafana dashboards ask for metrics and labels that servers, gateways and the operator have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from gantline_gateway.directory import Directory
from gantline_gateway.metrics import Metrics as GatewayMetrics
from gantline_gateway.traffic import Traffic, Usage
from gantline_gateway.usage import UsageCounters
from gantline_operator.cache_ledger import Ledger
from gantline_operator.conditions import Reason
from gantline_operator.metrics import Metrics as OperatorMetrics
from gantline_runtime.engine_messages import EngineReport
from gantline_runtime.server.lifecycle import State
from gantline_runtime.server.metrics import Metrics as ServerMetrics
from prometheus_client import generate_latest

from tests.operator.helm import render
from tests.runtime.server_process import ROOT

BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "charts/gantline/dashboards").glob("*.json"))}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
EACH_PANEL = pytest.mark.parametrize("panel", [pytest.param(panel, id=f"{name}: {panel['title']}") for name, panel in PANELS])
QUERIES = [
    pytest.param(target["expr"], id=f"{name}: {panel['title']} {target['refId']}") for name, panel in PANELS for target in panel["targets"]
]
UNITS = {"short", "string", "s", "bytes", "percentunit", "reqps", "ops"}
"""Of Grafana's; `make dashboards` asks Grafana's own list."""
OPTIONS = {
    "timeseries": {"legend", "tooltip"},
    "stat": {"reduceOptions", "colorMode", "graphMode", "justifyMode", "orientation", "textMode"},
    "table": {"showHeader", "cellHeight"},
}
LONGEST_TITLE = {4: 18, 6: 32, 8: 46, 12: 70}
"""By a panel's width: more is cut on a laptop."""
SINCE_A_START = "sum by (node) (gantline_gpu_failures_total)"
"""A rate would miss the first of each node, which is the one that counts."""
OF_THE_SCRAPE = {"namespace", "service", "pod", "le"}
ENDINGS = ("_total", "_bucket")


def test_there_is_a_board_for_a_service_and_one_for_the_fleet() -> None:
    assert {name: board["uid"] for name, board in BOARDS.items()} == {"fleet": "gantline-fleet", "service": "gantline-service"}


def _operator() -> OperatorMetrics:
    metrics = OperatorMetrics()
    metrics.reconciles.labels("done").inc()
    metrics.requests.labels("GET", "200").inc()
    metrics.scalings.labels("up").inc()
    metrics.duration.observe(0.01)
    metrics.device_failures.labels("node-1").inc()
    metrics.observe_leader(lambda: True)
    condition = {"status": "True", "reason": "Ready"}
    conditions = [{"type": "Ready", **condition}, {"type": "Servable", **condition}, {"type": "Degraded", **condition}]
    metrics.observe(lambda: (0, 0.0), lambda: {("n", "s"): conditions}, lambda: {("n", "claim"): (Ledger(), 1)})
    return metrics


def _pages() -> Iterator[bytes]:
    server = ServerMetrics("0")
    server.engine(EngineReport(step_times={"schedule": 0.0}, promised_bytes={"weights": 0}, reserved_bytes={"weights": 0}))
    server.http("/health", "GET", 200)
    server.startup("weights", 0.0)
    yield server.render(State.READY)
    traffic, usage = Traffic(), UsageCounters()
    traffic.of("n/s").count_usage(Usage(1, 1, 1), 1)
    traffic.of("n/s").outcomes["ok"] += 1
    traffic.of("n/s").retries["reset"] += 1
    usage.count("alice", Usage(1, 1, 1))
    usage.count_limited("alice", "tokens")
    traffic.unserved["model_not_found"] += 1
    page = GatewayMetrics(traffic, Directory(), "1")
    page.register(usage)
    yield page.render()
    yield generate_latest(_operator().registry)


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Every name that a /metrics shows, with its labels."""
    found: dict[str, set[str]] = {}
    for page in _pages():
        for line in page.decode().splitlines():
            name = re.match(r"gantline_\w+", line)
            if name:
                found.setdefault(name[0], set()).update(re.findall(r'(\w+)="', line))
            elif family := re.match(r"# TYPE (gantline_\w+) gauge", line):
                found.setdefault(family[1], {"namespace", "service"})  # of services that there are none of here
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_names_metrics_and_labels_that_exist(query: str, series: dict[str, set[str]]) -> None:
    names = re.findall(r"gantline_\w+", query)
    assert names and set(names) <= set(series)
    selected = {label for group in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)=", group)}
    grouped = {label for group in re.findall(r"(?:by|ignoring) ?\(([^)]*)\)", query) for label in re.split(r",\s*", group)}
    assert selected | grouped <= OF_THE_SCRAPE.union(*(series[name] for name in names))
    assert query.count("(") == query.count(")")


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_shown_as_rates_and_gauges_never_are(query: str) -> None:
    if query == SINCE_A_START:
        return
    for rated, name in re.findall(r"(rate\()?(gantline_\w+)", query):
        assert bool(rated) == name.endswith(ENDINGS)


def test_the_files_are_what_their_tables_say() -> None:
    done = subprocess.run([sys.executable, "-m", "scripts.dashboards", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_lie_over_each_other_and_fit_the_page(name: str) -> None:
    panels = BOARDS[name]["panels"]
    cells = Counter(
        (x, y) for _, at in _places(panels) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    )
    assert max(cells.values()) == 1 and {x for x, _ in cells} == set(range(24))
    assert len({panel["id"] for panel in panels}) == len({title for title, _ in _places(panels)}) == len(panels)


def _places(panels: list[dict[str, Any]]) -> list[tuple[str, dict[str, int]]]:
    return [(panel["title"], panel["gridPos"]) for panel in panels]


@EACH_PANEL
def test_a_panel_says_what_it_tells_in_words_and_units_that_grafana_knows(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".") and len(panel["title"]) <= LONGEST_TITLE[panel["gridPos"]["w"]]
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert set(panel["options"]) == OPTIONS[panel["type"]]
    if panel["type"] == "timeseries":
        assert panel["options"]["legend"]["showLegend"] and all(target["legendFormat"] for target in panel["targets"])


@EACH_PANEL
def test_each_query_asks_the_chosen_data_source(panel: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [chosen] * (1 + len(panel["targets"]))


@pytest.mark.parametrize("name", BOARDS)
def test_every_variable_is_there_and_used(name: str) -> None:
    given = {variable["name"] for variable in BOARDS[name]["templating"]["list"]}
    text = json.dumps([panel for board, panel in PANELS if board == name])
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"} == given


@EACH_PANEL
def test_reasons_that_a_panel_names_exist(panel: dict[str, Any]) -> None:
    asked = re.findall(r'reason[!=]~?"([\w|]+)"', json.dumps([target["expr"] for target in panel["targets"]]).replace('\\"', '"'))
    legends = {target.get("legendFormat") for target in panel["targets"]}
    colored = [rule["matcher"]["options"].strip("/^()$") for rule in panel["fieldConfig"]["overrides"]] if legends == {"{{reason}}"} else []
    assert {reason for text in asked + colored for reason in text.split("|")} <= set(Reason)


def test_counters_of_what_may_fail_begin_at_zero() -> None:
    """A rate does not see how a series begins, so the first failure would be missed."""
    pages = b"".join(_pages()).decode()
    for series in (
        'gantline_gateway_requests_total{namespace="n",outcome="failed",service="s"}',
        'gantline_gateway_retries_total{cause="unreachable",namespace="n",service="s"}',
        'gantline_gateway_key_limited_total{key="alice",limit="concurrency"}',
        'gantline_scalings_total{direction="down"}',
    ):
        assert f"{series} 0.0\n" in pages


def test_the_chart_installs_them_only_when_asked_with_the_sidecars_label() -> None:
    def boards(values: dict[str, Any]) -> list[dict[str, Any]]:
        return [item for item in render(values) if item["kind"] == "ConfigMap" and item["metadata"]["name"].endswith("-dashboard")]

    assert boards({}) == []
    (made,) = boards({"dashboard": {"enabled": True}})
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(made["data"][f"gantline-{name}.json"]) for name in BOARDS} == BOARDS
    assert len(yaml.safe_dump(made)) < 900_000, "a ConfigMap holds at most 1 MiB"
