"""The Grafana dashboards ask for metrics and labels that servers, gateways and the operator have."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gantline_gateway.directory import Directory
from gantline_gateway.metrics import Metrics as GatewayMetrics
from gantline_gateway.traffic import Traffic, Usage
from gantline_gateway.usage import UsageCounters
from gantline_operator.cache_ledger import Ledger
from gantline_operator.metrics import Metrics as OperatorMetrics
from gantline_runtime.engine_messages import EngineReport
from gantline_runtime.server.lifecycle import State
from gantline_runtime.server.metrics import Metrics as ServerMetrics
from prometheus_client import generate_latest, start_http_server

from tests.gateway.gateway_process import gateway, write_services
from tests.operator.helm import render
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ROOT, running, wait_until

BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "charts/gantline/dashboards").glob("*.json"))}
QUERIES = [
    pytest.param(target["expr"], id=f"{name}: {panel['title']} {target['refId']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    for target in panel["targets"]
]
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
    for rated, name in re.findall(r"(rate\()?(gantline_\w+)", query):
        assert bool(rated) == name.endswith(ENDINGS)


def test_the_files_are_what_their_tables_say() -> None:
    done = subprocess.run([sys.executable, "scripts/dashboard.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_lie_over_each_other_and_fit_the_page(name: str) -> None:
    panels = BOARDS[name]["panels"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places) and all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)
    assert len({p["id"] for p in panels}) == len(places)


def test_the_chart_installs_them_only_when_asked_with_the_sidecars_label() -> None:
    def boards(values: dict[str, Any]) -> list[dict[str, Any]]:
        return [item for item in render(values) if item["kind"] == "ConfigMap" and item["metadata"]["name"].endswith("-dashboard")]

    assert boards({}) == []
    (made,) = boards({"dashboard": {"enabled": True}})
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {name: json.loads(made["data"][f"gantline-{name}.json"]) for name in BOARDS} == BOARDS
    assert len(yaml.safe_dump(made)) < 900_000, "a ConfigMap holds at most 1 MiB"


# ---- against a real Prometheus ---------------------------------------------------------------------------------------------------------

QUIET = {
    "Nobody answers",
    "Second attempts by cause",
    "Refused by limits of API keys",
    "Answers' tokens by API key",
    "How long requests were held",
}
"""Panels that are empty while all is well, or while nobody has a key."""


@pytest.mark.skipif(
    not os.environ.get("GANTLINE_FULL_MATRIX") or not shutil.which("prometheus"),
    reason="asks a real Prometheus: GANTLINE_FULL_MATRIX=1, and apt-get install prometheus",
)
def test_a_real_prometheus_has_data_for_every_panel(tmp_path: Path) -> None:
    metrics = _operator()
    operator, stop = start_http_server(0, "127.0.0.1", registry=metrics.registry)
    with running(write_model(tmp_path / "echo")) as server, gateway(_services(tmp_path, server.url)) as door:
        jobs = {"server": server.url, "gateway": door.internal_url, "operator": f"http://127.0.0.1:{operator.server_port}"}
        with _prometheus(tmp_path, jobs) as url:
            began = time.monotonic()
            while time.monotonic() - began < 25:
                for prompt in ("a" * 400, "b"):
                    answer = door.post("/v1/completions", {"model": "echo", "prompt": prompt, "max_tokens": 20})
                    assert answer.status_code == 200, answer.text
                metrics.duration.observe(0.01)
                time.sleep(0.2)
            assert not (empty := _empty(url)), ", ".join(empty)
    operator.shutdown()
    stop.join()


def _services(folder: Path, url: str) -> Path:
    return write_services(folder / "services.json", {"name": "echo", "replicas": [url]})


def _empty(url: str) -> list[str]:
    """Panels of which no query has an answer that is a number."""
    found = []
    for panel in [panel for board in BOARDS.values() for panel in board["panels"] if panel["title"] not in QUIET]:
        answers = [_ask(url, target["expr"]) for target in panel["targets"]]
        if not any(value == value for values in answers for value in values):
            found.append(panel["title"])
    return found


def _ask(url: str, query: str) -> list[float]:
    query = re.sub(r'\w+=~"\$\w+",? ?', "", query).replace("$__rate_interval", "20s")
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=60).json()
    assert answer["status"] == "success", (query, answer)
    return [float(item["value"][1]) for item in answer["data"]["result"]]


class _prometheus:
    """Scrapes `jobs` each second for as long as it is entered."""

    def __init__(self, folder: Path, jobs: dict[str, str]) -> None:
        self._folder = folder
        scrapes = [
            {"job_name": name, "honor_labels": True, "static_configs": [{"targets": [url.removeprefix("http://")]}]}
            for name, url in jobs.items()
        ]
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": scrapes}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        flags = [f"--config.file={self._folder}/prometheus.yml", f"--storage.tsdb.path={self._folder}/data"]
        command = ["prometheus", *flags, f"--web.listen-address={address}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: _answers(f"http://{address}/-/ready"), timeout_s=30, what="Prometheus is ready")
        return f"http://{address}"

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
