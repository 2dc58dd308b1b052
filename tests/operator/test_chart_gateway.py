"""The gateway as the chart installs it: two of it, reading no more than it needs, reached from outside only where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gantline_gateway.key_secrets import LABEL
from gantline_gateway.settings import from_environment

from tests.operator.helm import CHART, MINIMUM, render, run_helm
from tests.operator.test_chart import INSTALLATIONS, of_kind

Object = dict[str, Any]
NAME = "gantline-gateway"
READ = ["get", "list", "watch"]


def deployment(values: Object | None = None) -> Object:
    (found,) = of_kind(render(values), "Deployment", NAME)
    return found


def environment(values: Object) -> dict[str, str]:
    container = deployment(values)["spec"]["template"]["spec"]["containers"][0]
    return {item["name"]: item["value"] for item in container["env"] if item["name"].startswith("GANTLINE_")}


def rights(objects: list[Object], kind: str, name: str) -> list[tuple[str, list[str]]]:
    return [(resource, rule["verbs"]) for item in of_kind(objects, kind, name) for rule in item["rules"] for resource in rule["resources"]]


def test_two_pods_apart_end_after_their_streams_and_not_both_at_once() -> None:
    objects = render()
    spec = deployment()["spec"]
    pod = spec["template"]["spec"]
    assert spec["replicas"] == 2 and spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert [item["topologyKey"] for item in pod["topologySpreadConstraints"]] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert of_kind(objects, "PodDisruptionBudget", NAME)[0]["spec"]["maxUnavailable"] == 1
    assert pod["terminationGracePeriodSeconds"] > from_environment(environment({})).drain_timeout
    container = pod["containers"][0]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": 8080, "internal": 8081}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "internal"}
    assert container["command"] == ["gantline-gateway"] and pod["enableServiceLinks"] is False
    service = of_kind(objects, "Service", NAME)[0]["spec"]
    public = {"name": "http", "port": 80, "targetPort": "http", "appProtocol": "http"}
    assert service["ports"] == [public], "metrics and demand stay inside"
    assert service["selector"].items() <= spec["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", [name for name in INSTALLATIONS if name != "nothing-extra"])
def test_the_gateway_understands_every_setting_that_the_chart_gives(name: str) -> None:
    settings = from_environment(environment(INSTALLATIONS[name]))
    keys = name == "everything"
    assert (settings.port, settings.internal_port) == (8080, 8081)
    assert settings.own_service == f"gantline-system/{NAME}" and settings.api_key_secrets == ("gantline-system" if keys else "")
    assert settings.tls_cert == (Path("/etc/gantline/tls/tls.crt") if keys else None)
    assert settings.cors_origins == (("https://app.example.com", "http://localhost:3000") if keys else ())
    assert (settings.head_timeout, settings.body_timeout, settings.stall_timeout) == ((10, 300, 20) if keys else (30, 60, 30))
    assert settings.drain_timeout == (300 if keys else 120) and settings.log_level == ("debug" if keys else "info")


def test_with_tls_the_public_port_alone_speaks_https_from_a_secret_that_is_renewed_in_place() -> None:
    values = {"gateway": {"tls": {"secretName": "gateway-tls"}}}
    pod = deployment(values)["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"https": 8080, "internal": 8081}
    probes = [container[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert all(probe["port"] == "internal" and "scheme" not in probe for probe in probes)
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "tls"]
    assert mount == {"name": "tls", "mountPath": "/etc/gantline/tls", "readOnly": True}, "a subPath would never be renewed"
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "tls"]
    assert volume["secret"]["secretName"] == "gateway-tls"
    given = from_environment(environment(values))
    assert [given.tls_cert, given.tls_key] == [Path(mount["mountPath"], item["path"]) for item in volume["secret"]["items"]]
    (service,) = of_kind(render(values), "Service", NAME)
    assert service["spec"]["ports"] == [{"name": "https", "port": 443, "targetPort": "https", "appProtocol": "https"}]


def test_in_the_whole_cluster_it_reads_services_and_their_endpoints_and_nothing_else() -> None:
    objects = render()
    assert rights(objects, "ClusterRole", f"{NAME}-gantline-system") == [("inferenceservices", READ), ("endpointslices", READ)]
    assert rights(objects, "Role", f"{NAME}-own") == [("endpointslices", READ)]


def test_of_two_namespaces_it_reads_these_alone() -> None:
    objects = render(INSTALLATIONS["two-namespaces"])
    assert not [item for item in of_kind(objects, "ClusterRole") if NAME in item["metadata"]["name"]]
    roles = of_kind(objects, "Role", NAME)
    assert [item["metadata"]["namespace"] for item in roles] == ["team-a", "team-b"]
    assert environment(INSTALLATIONS["two-namespaces"])["GANTLINE_GATEWAY_WATCH_NAMESPACES"] == "team-a,team-b"


def test_secrets_are_read_in_its_own_namespace_and_only_for_api_keys() -> None:
    objects = render({"gateway": {"apiKeys": {"enabled": True}}})
    readers = [item for item in objects if any("secrets" in rule["resources"] for rule in item.get("rules") or [])]
    assert [(item["kind"], item["metadata"]["namespace"]) for item in readers] == [("Role", "gantline-system")]
    assert rights(objects, "Role", f"{NAME}-own") == [("endpointslices", READ), ("secrets", READ)]


def test_from_outside_only_the_api_is_reached_and_only_if_asked_for() -> None:
    assert not of_kind(render(), "Ingress") and not of_kind(render(), "HTTPRoute")
    (found,) = of_kind(render(INSTALLATIONS["everything"]), "Ingress")
    backend = {"service": {"name": NAME, "port": {"name": "https"}}}
    rule = {"host": "llm.example.com", "http": {"paths": [{"path": "/v1", "pathType": "Prefix", "backend": backend}]}}
    assert found["spec"]["rules"] == [rule] and found["spec"]["ingressClassName"] == "nginx"
    assert found["spec"]["tls"] == [{"hosts": ["llm.example.com"], "secretName": "llm-tls"}]


def test_network_policies_let_it_reach_servers_and_nobody_else_but_whom_it_asks() -> None:
    assert not of_kind(render(), "NetworkPolicy")
    (policy,) = of_kind(render(INSTALLATIONS["everything"]), "NetworkPolicy")
    spec = policy["spec"]
    assert spec["podSelector"]["matchLabels"].items() <= deployment()["spec"]["template"]["metadata"]["labels"].items()
    assert [port["port"] for rule in spec["ingress"] for port in rule["ports"]] == [8080, 8081]
    assert [port["port"] for rule in spec["egress"] for port in rule["ports"]] == [53, 53, 5353, 5353, 443, 8443, 8000]


def test_nothing_of_it_is_there_where_it_is_not_wanted() -> None:
    objects = render({"gateway": {"enabled": False, "ingress": {"host": "llm.example.com"}}})
    assert not [item for item in objects if "gateway" in item["metadata"]["name"]]


@pytest.mark.parametrize(
    ("gateway", "address", "said"),
    [
        ({}, "https://gantline-gateway.n.svc/v1", "service/gantline-gateway 8080:443"),
        ({"service": {"port": 8443}}, "https://gantline-gateway.n.svc:8443/v1", "service/gantline-gateway 8080:8443"),
        ({"ingress": {"host": "llm.example.com"}}, "https://gantline-gateway.n.svc/v1", "has to speak HTTPS to it"),
    ],
)
def test_notes_with_tls_say_https_and_what_an_ingress_then_needs(gateway: Object, address: str, said: str) -> None:
    values = {**MINIMUM, "gateway": {"tls": {"secretName": "gateway-tls"}, **gateway}}
    result = run_helm("install", "gantline", str(CHART), "--dry-run=client", "--namespace", "n", values=values)
    notes = result.stdout.partition("NOTES:")[2]
    assert address in notes and said in notes, result.stderr
    assert ("has to speak HTTPS" in notes) == ("ingress" in gateway)


@pytest.mark.parametrize(("keys", "said"), [(False, "Whoever reaches it may ask"), (True, f"{LABEL}=true")])
def test_notes_say_its_address_and_who_may_ask(keys: bool, said: str) -> None:
    values = {**MINIMUM, "gateway": {"apiKeys": {"enabled": keys}}}
    result = run_helm("install", "gantline", str(CHART), "--dry-run=client", "--namespace", "n", values=values)
    assert result.returncode == 0, result.stderr
    notes = result.stdout.partition("NOTES:")[2]
    assert "http://gantline-gateway.n.svc/v1" in notes and said in notes
