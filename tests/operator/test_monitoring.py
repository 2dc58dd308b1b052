"""What the chart gives the Prometheus operator: only where its kinds are known, alerts on what the operator exports, a runbook for each."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_devcluster.api_only import ApiCluster
from gantline_gateway.directory import Directory
from gantline_gateway.metrics import Metrics as GatewayMetrics
from gantline_gateway.traffic import Traffic
from gantline_operator.conditions import ConditionType, Reason
from gantline_operator.metrics import Metrics
from prometheus_client import generate_latest

from tests.operator.definition import wait_until_established
from tests.operator.helm import CHART, MINIMUM, render, run_helm
from tests.operator.render_cases import CASES

Object = dict[str, Any]

OPERATIONS = (Path(__file__).parents[2] / "docs/operations.md").read_text()
MONITOR, RULE = "monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule"
MONITORS = ["PodMonitor/gantline-gateway", "PodMonitor/gantline-operator", "PodMonitor/gantline-servers"]


def monitoring(values: Object | None = None, *kinds: str) -> dict[str, Object]:
    objects = render({"metrics": values} if values else {}, kinds=kinds)
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in objects if item["apiVersion"] == "monitoring.coreos.com/v1"}


@pytest.mark.parametrize(
    ("values", "kinds", "expected"),
    [
        ({}, (), []),
        ({}, (MONITOR, RULE), [*MONITORS, "PrometheusRule/gantline"]),
        ({}, (MONITOR,), MONITORS),
        ({"prometheusOperator": False}, (MONITOR, RULE), []),
        ({"prometheusOperator": True}, (), [*MONITORS, "PrometheusRule/gantline"]),
    ],
)
def test_each_kind_is_used_where_it_is_known_unless_told_otherwise(values: Object, kinds: tuple[str, ...], expected: list[str]) -> None:
    made = monitoring({**values, "labels": {"release": "prometheus"}}, *kinds)
    assert sorted(made) == expected
    assert all(item["metadata"]["labels"]["release"] == "prometheus" for item in made.values())


def test_one_monitor_finds_the_pods_of_every_service_by_a_port_that_they_have() -> None:
    spec = monitoring({}, MONITOR)["PodMonitor/gantline-servers"]["spec"]
    assert spec["namespaceSelector"] == {"any": True}
    for case in CASES.values():
        template = next(item for item in case.objects() if item["kind"] == "Deployment")["spec"]["template"]
        assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert spec["podMetricsEndpoints"][0]["port"] in [port["name"] for port in template["spec"]["containers"][0]["ports"]]
        for job in case.jobs():
            assert not spec["selector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    narrow = render({"rbac": {"scope": "namespace"}, "watchNamespaces": ["a", "b"]}, kinds=(MONITOR,))
    found = next(item for item in narrow if item["metadata"]["name"] == "gantline-servers")
    assert found["spec"]["namespaceSelector"] == {"matchNames": ["a", "b"]}


def test_the_operators_monitor_finds_its_pod_and_keeps_the_services_labels() -> None:
    objects = render(kinds=(MONITOR,))
    spec = next(item for item in objects if item["metadata"]["name"] == "gantline-operator" and item["kind"] == "PodMonitor")["spec"]
    template = next(item for item in objects if item["kind"] == "Deployment")["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert "metrics" in [port["name"] for port in template["spec"]["containers"][0]["ports"]]
    assert spec["podMetricsEndpoints"] == [{"port": "metrics", "honorLabels": True}]


def alerts() -> list[Object]:
    (group,) = monitoring({}, RULE)["PrometheusRule/gantline"]["spec"]["groups"]
    rules: list[Object] = group["rules"]
    return rules


def exported() -> set[str]:
    """Names of the operator's and the gateway's series, counted ones with `_total`."""
    metrics = Metrics()
    metrics.errors.labels("Forbidden").inc()
    metrics.observe_leader(lambda: True)
    metrics.observe(lambda: (0, 0.0), lambda: {("n", "s"): [{"type": "Ready", "status": "True", "reason": "Ready"}]})
    traffic = Traffic()
    traffic.of("n/s").outcomes["failed"] += 1
    gateway = GatewayMetrics(traffic, Directory(), "1")
    return set(re.findall(r"^(gantline_\w+)", (generate_latest(metrics.registry) + gateway.render()).decode(), re.M))


def test_alerts_ask_for_series_conditions_and_reasons_that_exist() -> None:
    for alert in alerts():
        expression = alert["expr"]
        assert set(re.findall(r"gantline_\w+(?=\{)", expression)) <= exported(), alert["alert"]
        assert set(re.findall(r'type="(\w+)"', expression)) <= set(ConditionType)
        reasons = {reason for text in re.findall(r'reason[!=]~"([\w|]+)"', expression) for reason in text.split("|")}
        assert reasons <= set(Reason)
        job = "gantline-system/" + ("gantline-gateway" if "Gateway" in alert["alert"] else "gantline-operator")
        assert set(re.findall(r'job="([^"]+)"', expression)) == {job}, "a PodMonitor's job is its name"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    named = {alert["alert"]: alert["annotations"]["runbook"] for alert in alerts()}
    assert named == {name: f"docs/operations.md#{name.lower()}" for name in named}
    assert list(named) == re.findall(r"^### (Gantline\w+)$", OPERATIONS, re.M)
    for alert in alerts():
        assert alert["labels"]["severity"] in ("warning", "critical") and alert["for"] and alert["annotations"]["summary"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
def test_a_service_that_fails_again_and_again_raises_its_alerts_though_each_attempt_looks_like_a_beginning(tmp_path: Path) -> None:
    """Ten minutes of failure, then two of the next attempt, as Prometheus judges it; and a first preparation, which is no trouble."""
    labels = 'job="gantline-system/gantline-operator", namespace="n"'

    def series(service: str, type_: str, reason: str, values: str) -> Object:
        return {"series": f'gantline_condition{{{labels}, service="{service}", type="{type_}", reason="{reason}"}}', "values": values}

    attempts, pauses = "stale _x9 0 0 " * 8, "0x9 stale _ " * 8
    given = [
        series("failing", "Servable", "NotAvailable", "0x99"),
        series("failing", "Ready", "Fetching", attempts),
        series("failing", "Ready", "DownloadFailed", pauses),
        series("failing", "Degraded", "DownloadFailed", pauses.replace("0x9", "1x9")),
        series("large", "Servable", "NotAvailable", "0x99"),
        series("large", "Ready", "Fetching", "0x99"),
    ]
    severities = {"GantlineServiceNotServable": "critical", "GantlineServiceDegraded": "warning"}
    expected = [
        {
            "eval_time": at,
            "alertname": alert["alert"],
            "exp_alerts": [
                {
                    "exp_labels": {"namespace": "n", "service": "failing", "severity": severities[alert["alert"]]},
                    "exp_annotations": {
                        "runbook": alert["annotations"]["runbook"],
                        "summary": alert["annotations"]["summary"].replace("{{ $labels.namespace }}/{{ $labels.service }}", "n/failing"),
                    },
                }
            ],
        }
        for alert in alerts()
        if alert["alert"] in severities
        for at in ("40m", "59m", "71m", "80m")
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "gantline", "rules": alerts()}]}))
    test = {"interval": "1m", "input_series": given, "alert_rule_test": expected}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_auto_asks_the_api_server_itself(api_cluster: ApiCluster, namespace: str) -> None:
    cluster = ("--dry-run=server", "--namespace", namespace, "--kubeconfig", str(api_cluster.kubeconfig))
    command = ("template", "gantline", str(CHART), *cluster)
    assert "kind: PodMonitor" not in run_helm(*command, values=MINIMUM).stdout
    names = {"kind": "PodMonitor", "listKind": "PodMonitorList", "plural": "podmonitors", "singular": "podmonitor"}
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    definition = {
        "metadata": {"name": "podmonitors.monitoring.coreos.com"},
        "spec": {"group": "monitoring.coreos.com", "scope": "Namespaced", "names": names, "versions": [version]},
    }
    api_cluster.client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
    try:
        wait_until_established(api_cluster, "podmonitors.monitoring.coreos.com")
        rendered = run_helm(*command, values=MINIMUM)
        assert rendered.returncode == 0, rendered.stderr
        assert "kind: PodMonitor" in rendered.stdout and "kind: PrometheusRule" not in rendered.stdout
    finally:
        api_cluster.kubectl("delete", "crd", "podmonitors.monitoring.coreos.com")
