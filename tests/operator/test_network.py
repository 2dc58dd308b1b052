"""NetworkPolicies: what they allow, and that they are there before any pod and go when the installation no longer asks for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import resources

from tests.operator.harness import TINY, apply, fates, inspected, install_crd, items, service, serving, wait, wait_reason
from tests.operator.render_cases import SETTINGS, parent_of
from tests.operator.render_cases import service as manifest_of

Object = dict[str, Any]

LOCAL = {"model": {"uri": "file:///m"}}
REMOTE = {"model": {"uri": "hf://org/name"}}
ON = replace(SETTINGS, network_policies=True)


def policies(spec: Object, **settings: Any) -> dict[str, Object]:
    made = resources.network_policies(parent_of(manifest_of(spec)), replace(ON, **settings))
    return {item["metadata"]["name"]: item["spec"] for item in made}


def selects(policy: Object, role: str) -> bool:
    """As the API defines a label selector, for a pod of the service with this role."""
    marks = {"gantline.io/service": "chat", "gantline.io/role": role}
    selector = policy["podSelector"]
    return selector["matchLabels"].items() <= marks.items() and all(
        marks[term["key"]] in term["values"] for term in selector.get("matchExpressions", [])
    )


def allowed(made: dict[str, Object], role: str, direction: str) -> set[int]:
    """Ports that a pod of this role may use, by all policies that select it; everything, unless one isolates it."""
    chosen = [policy for policy in made.values() if selects(policy, role)]
    assert any(direction.capitalize() in policy["policyTypes"] for policy in chosen), "not isolated"
    return {port["port"] for policy in chosen for rule in policy.get(direction, []) for port in rule["ports"]}


def test_nothing_is_made_unless_the_installation_asks() -> None:
    assert resources.network_policies(parent_of(manifest_of(REMOTE)), SETTINGS) == []


@pytest.mark.parametrize(
    ("spec", "role", "inward", "outward"),
    [
        (LOCAL, "server", {8000}, {53, 5353}),
        (LOCAL, "inspect", set(), set()),
        (LOCAL, "quantize", set(), set()),
        (REMOTE, "server", {8000}, {53, 5353}),
        (REMOTE, "inspect", set(), {53, 80, 443, 5353}),
        (REMOTE, "fetch", set(), {53, 80, 443, 5353}),
        (REMOTE, "quantize", set(), set()),
    ],
)
def test_each_pod_may_do_what_its_work_needs_and_no_more(spec: Object, role: str, inward: set[int], outward: set[int]) -> None:
    made = policies(spec)
    assert (allowed(made, role, "ingress"), allowed(made, role, "egress")) == (inward, outward)


@pytest.mark.parametrize(
    ("env", "endpoint", "port"),
    [
        ([], "http://hub.internal:8081", 8081),
        ([{"name": "HF_ENDPOINT", "value": "http://mirror:8082/hub"}], "", 8082),
        ([{"name": "https_proxy", "value": "http://user@proxy:3128"}], "", 3128),
        ([{"name": "HTTPS_PROXY", "value": "proxy:3129"}], "", 3129),
        ([{"name": "ALL_PROXY", "value": "http://proxy:none"}], "", None),
        ([{"name": "OTHER", "value": "http://elsewhere:9000"}], "", None),
    ],
)
def test_a_hub_or_a_proxy_at_a_port_of_its_own_is_reached(env: list[Object], endpoint: str, port: int | None) -> None:
    made = policies({**REMOTE, "pod": {"env": env}}, hf_endpoint=endpoint)
    assert allowed(made, "fetch", "egress") == {53, 80, 443, 5353} | ({port} if port else set())
    assert allowed(made, "server", "egress") == {53, 5353}


@pytest.mark.parametrize(
    ("uri", "endpoint", "port"),
    [
        ("oci://registry.example:5000/team/tiny:v1", "", 5000),
        ("oci://registry.example/team/tiny:v1", "", None),
        ("s3://models/tiny", "https://minio.example:9000", 9000),
    ],
)
def test_a_registry_or_an_endpoint_at_a_port_of_its_own_is_reached(uri: str, endpoint: str, port: int | None) -> None:
    made = policies({**REMOTE, "model": {"uri": uri}}, s3_endpoint=endpoint)
    assert allowed(made, "fetch", "egress") == {53, 80, 443, 5353} | ({port} if port else set())


def test_servers_answer_to_everyone_unless_the_installation_names_their_clients() -> None:
    assert "from" not in policies(LOCAL)["chat-server"]["ingress"][0]
    clients = ("system/app.kubernetes.io/name=gantline-gateway", "monitoring")
    rule = policies(LOCAL, server_clients=clients)["chat-server"]["ingress"][0]
    gateway = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "system"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "gantline-gateway"}},
    }
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert rule == {"ports": [{"protocol": "TCP", "port": 8000}], "from": [gateway, monitoring]}


def test_policies_stand_before_the_first_pod_and_go_with_the_setting(api_cluster: ApiCluster, namespace: str) -> None:
    install_crd(api_cluster)
    fates(api_cluster, inspected(walled=TINY))
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    with serving(api_cluster, namespace, network_policies=True) as operator:
        apply(api_cluster, service("walled", namespace))
        wait_reason(api_cluster, "walled", namespace, "Ready")
        made = [path.rpartition("/")[2].partition("?")[0] for _, path in operator.writes if "/networkpolicies/" in path]
        first_job = next(index for index, (_, path) in enumerate(operator.writes) if "/jobs" in path)
        before = [path for _, path in operator.writes[:first_job] if "/networkpolicies/" in path]
        assert set(made) == {"walled-isolated", "walled-server"} and len(before) == 2
        apply(api_cluster, service("walled", namespace, model={"uri": "hf://org/name"}))
        wait(lambda: len(items(api_cluster, "networkpolicies", namespace)) == 3)
        apply(api_cluster, service("walled", namespace))
        wait(lambda: len(items(api_cluster, "networkpolicies", namespace)) == 2)
        wait_reason(api_cluster, "walled", namespace, "Ready")
    with serving(api_cluster, namespace):
        wait(lambda: not items(api_cluster, "networkpolicies", namespace))
        wait_reason(api_cluster, "walled", namespace, "Ready")


def test_a_service_whose_policy_cannot_be_made_starts_no_pod(api_cluster: ApiCluster, namespace: str) -> None:
    install_crd(api_cluster)
    foreign = {"metadata": {"name": "walled-server"}, "spec": {"podSelector": {}}}
    api_cluster.client.post(f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies", foreign)
    with serving(api_cluster, namespace, network_policies=True):
        apply(api_cluster, service("walled", namespace))
        found = wait_reason(api_cluster, "walled", namespace, "NameConflict")
        assert "NetworkPolicy walled-server exists and is not ours" in found["message"]
        assert not items(api_cluster, "jobs", namespace) and not items(api_cluster, "deployments", namespace)
