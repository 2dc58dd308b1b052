"""The chart, rendered for several installations: what it asks for, what it may do, what it refuses."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_operator.install_crds import main as install_crds_main
from gantline_operator.resources import MANAGED_KINDS
from gantline_operator.settings import OperatorSettings, from_environment
from gantline_operator.spec import parse_service
from gantline_operator.webhook.server import PATH

from tests.operator.helm import CHART, MINIMUM, render, run_helm

ROOT = Path(__file__).resolve().parents[2]
Object = dict[str, Any]

INSTALLATIONS: dict[str, Object] = {
    "default": {},
    "namespaced": {"rbac": {"scope": "namespace"}},
    "two-namespaces": {"rbac": {"scope": "namespace", "readNodes": True}, "watchNamespaces": ["team-a", "team-b"]},
    "everything": {
        "image": {"repository": "registry.example/operator", "tag": "1.2.3", "pullPolicy": "Always"},
        "imagePullSecrets": ["own"],
        "replicaCount": 2,
        "podUser": "cluster",
        "webhook": {"enabled": True, "timeoutSeconds": 3},
        "runtime": {
            "images": {"cuda": "registry.example/runtime:1", "cpu": "registry.example/runtime-cpu@sha256:" + "0" * 64},
            "imagePullPolicy": "Always",
            "imagePullSecrets": ["first", "second"],
            "hfEndpoint": "https://hub.example",
            "s3Endpoint": "https://minio.example:9000",
            "insecureRegistries": ["registry.example:5000", "other.example"],
            "networkPolicy": {"enabled": True, "clients": "gateway", "alsoFrom": ["monitoring"], "apiServerPorts": [443, 8443]},
            "inferencePools": True,
        },
        "serviceAccount": {"annotations": {"example.com/role": "x"}},
        "inventory": {"pools": [{"name": "h100", "labels": {"pool": "h100"}}]},
        "operator": {"workers": 2, "resyncSeconds": 60, "scalingIntervalSeconds": 10, "jobRetentionSeconds": 600, "logLevel": "debug"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"example.com/c": "d"},
        "test": {"namespace": "team-a", "timeoutSeconds": 60},
        "customMetrics": {"enabled": True},
        "dashboard": {"enabled": True, "annotations": {"folder": "Inference"}},
        "gateway": {
            "replicas": 3,
            "apiKeys": {"enabled": True},
            "tls": {"secretName": "gateway-tls"},
            "corsOrigins": ["https://app.example.com", "http://localhost:3000"],
            "clients": {"headSeconds": 10, "bodySeconds": 300, "stallSeconds": 20},
            "drainSeconds": 300,
            "logLevel": "debug",
            "service": {"type": "LoadBalancer", "port": 8443, "annotations": {"example.com/lb": "internal"}},
            "ingress": {"host": "llm.example.com", "className": "nginx", "tlsSecret": "llm-tls", "annotations": {"example.com/x": "y"}},
        },
    },
    "nothing-extra": {
        "crds": {"install": False},
        "metrics": {"service": False},
        "rbac": {"create": False, "readLogs": False},
        "gateway": {"enabled": False},
    },
}


OF_THE_RELEASE: Object = {
    "demand_namespace": "gantline-system",
    "load_url": "http://gantline-metrics.gantline-system.svc:8080",
    "lease": "gantline-system/gantline",
    "calibration_configmap": "gantline-system/gantline-calibration",
}
"""Settings that no default could know."""


def of_kind(objects: list[Object], kind: str, name: str | None = None) -> list[Object]:
    return [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]


def pod_specs(objects: list[Object]) -> list[Object]:
    templates = [item["spec"]["template"] for item in objects if item["kind"] in ("Deployment", "Job")]
    return [item["spec"] for item in [*of_kind(objects, "Pod"), *templates]]


def rules(objects: list[Object]) -> list[Object]:
    return [rule for item in objects if item["kind"] in ("Role", "ClusterRole") for rule in item["rules"]]


def operator_environment(values: Object) -> dict[str, str]:
    deployment = of_kind(render(values), "Deployment", "gantline")[0]
    given = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    assert [item["name"] for item in given if "value" not in item] == ["GANTLINE_IDENTITY", "GANTLINE_ADDRESS"]
    return {item["name"]: item["value"] for item in given if "value" in item}


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_lint_finds_nothing(name: str) -> None:
    result = run_helm("lint", "--strict", str(CHART), values={**MINIMUM, **INSTALLATIONS[name]})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_every_pod_is_restricted_and_bounded(name: str) -> None:
    for pod in pod_specs(render(INSTALLATIONS[name])):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        users = {key: pod["securityContext"].get(key) for key in ("runAsUser", "runAsGroup", "fsGroup")}
        assert set(users.values()) == {None if name == "everything" else 1000}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys() and "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_rights_have_no_wildcard_no_secret_and_no_exec(name: str) -> None:
    objects = render(INSTALLATIONS[name])
    keys = of_kind(objects, "Role", "gantline-gateway-own") if name == "everything" else []
    for rule in rules([item for item in objects if item not in keys]):
        if rule["resources"] == ["secrets"]:
            assert rule["resourceNames"][0] in ("gantline-webhook", "gantline-custom-metrics") and len(rule["resourceNames"]) == 1
            assert rule["verbs"] == ["get", "patch"] and name == "everything"
            continue
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert not {"secrets", "pods/exec", "pods/attach", "pods/portforward", "serviceaccounts/token"} & set(rule["resources"])
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


@pytest.mark.parametrize("name", ["default", "namespaced"])
def test_the_operator_may_do_to_each_kind_of_child_what_it_does(name: str) -> None:
    where = ("ClusterRole", "gantline-gantline-system") if name == "default" else ("Role", "gantline")
    scope = of_kind(render(INSTALLATIONS[name]), *where)[0]
    granted = {(group, kind): set(rule["verbs"]) for rule in scope["rules"] for group in rule["apiGroups"] for kind in rule["resources"]}
    for kind in MANAGED_KINDS:
        wanted = {"get", "list", "watch", "create", "patch", "delete"} - ({"watch"} if kind.optional else set())
        assert granted[kind.api_version.rpartition("/")[0], kind.plural] == wanted, kind
    assert granted["gantline.io", "inferenceservices"] == {"get", "list", "watch"}, "the spec belongs to its author"
    assert granted["gantline.io", "inferenceservices/scale"] == {"patch"}
    assert granted["", "pods"] == {"get", "list", "watch", "patch", "delete"}
    assert granted["gantline.io", "inferenceservices/status"] == {"patch"} and granted["events.k8s.io", "events"] == {"list", "create"}


def test_a_namespaced_installation_has_rights_in_its_namespaces_alone() -> None:
    objects = render(INSTALLATIONS["namespaced"])
    hook = [item for item in of_kind(objects, "ClusterRole") if "helm.sh/hook" in item["metadata"].get("annotations", {})]
    people = [item for item in of_kind(objects, "ClusterRole") if item["metadata"]["name"].endswith(("-view", "-edit"))]
    assert len(of_kind(objects, "ClusterRole")) == len(hook) + len(people)
    bound = [item for item in of_kind(objects, "ClusterRoleBinding") if item not in hook]
    assert [item["roleRef"]["name"] for item in bound] == [hook[0]["metadata"]["name"]]
    assert {item["metadata"]["namespace"] for item in of_kind(objects, "Role")} == {"gantline-system"}
    assert operator_environment(INSTALLATIONS["namespaced"])["GANTLINE_WATCH_NAMESPACES"] == "gantline-system"
    assert operator_environment(INSTALLATIONS["namespaced"])["GANTLINE_OBSERVE_NODES"] == "never"


def test_each_watched_namespace_gets_a_role_and_nodes_only_on_request() -> None:
    objects = render(INSTALLATIONS["two-namespaces"])
    assert {item["metadata"]["namespace"] for item in of_kind(objects, "RoleBinding", "gantline")} == {"team-a", "team-b"}
    wide = of_kind(objects, "ClusterRole", "gantline-gantline-system")[0]
    assert all(rule["verbs"] == ["list", "watch"] for rule in wide["rules"])
    seen = [kind for rule in wide["rules"] for kind in rule["resources"]]
    assert seen == ["nodes", "deviceclasses", "resourceclaims", "resourceslices", "pods"]
    environment = operator_environment(INSTALLATIONS["two-namespaces"])
    assert (environment["GANTLINE_WATCH_NAMESPACES"], environment["GANTLINE_OBSERVE_NODES"]) == ("team-a,team-b", "auto")


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_the_operator_understands_every_setting_that_the_chart_gives(name: str) -> None:
    environment = operator_environment(INSTALLATIONS[name])
    settings = from_environment(environment)
    assert settings.metrics_port == 8080 and settings.health_port == 8081
    if name == "everything":
        assert settings == OperatorSettings(
            image_cuda="registry.example/runtime:1", image_cpu="registry.example/runtime-cpu@sha256:" + "0" * 64,
            image_pull_policy="Always", image_pull_secrets=("first", "second"), hf_endpoint="https://hub.example", network_policies=True,
            s3_endpoint="https://minio.example:9000", insecure_registries=("registry.example:5000", "other.example"),
            inference_pools="true",
            server_clients=(
                "gantline-system/app.kubernetes.io/name=gantline-gateway", "gantline-system/app.kubernetes.io/name=gantline-operator",
                "gantline-system/app.kubernetes.io/name=gantline-test", "monitoring",
            ),
            inventory_configmap="gantline-system/gantline-inventory", workers=2, resync_seconds=60, job_retention_seconds=600,
            log_level="debug", scaling_interval_seconds=10, custom_metrics_port=8443,
            custom_metrics_hosts=("gantline-custom-metrics.gantline-system.svc",),
            custom_metrics_secret="gantline-system/gantline-custom-metrics", webhook_port=9443,
            webhook_hosts=("gantline-webhook.gantline-system.svc",), webhook_secret="gantline-system/gantline-webhook",
            webhook_configuration="gantline-gantline-system", pod_user=None, **OF_THE_RELEASE,
        )  # fmt: skip


def test_the_custom_metrics_api_is_off_by_default_and_its_certificate_is_the_operators_or_given() -> None:
    assert not of_kind(render(), "APIService")
    values = {"customMetrics": {"enabled": True}}
    objects, given = render(values), operator_environment(values)
    api = of_kind(objects, "APIService")[0]
    assert api["spec"]["service"] == {"name": "gantline-custom-metrics", "namespace": "gantline-system", "port": 443}
    assert api["spec"].keys().isdisjoint({"caBundle", "insecureSkipTLSVerify"}) and "data" not in of_kind(objects, "Secret")[0]
    secret = of_kind(objects, "Secret")[0]["metadata"]["name"]
    assert given["GANTLINE_CUSTOM_METRICS_SECRET"] == f"gantline-system/{secret}"
    assert given["GANTLINE_CUSTOM_METRICS_HOSTS"] == "gantline-custom-metrics.gantline-system.svc"
    for plural, name in (("secrets", secret), ("apiservices", api["metadata"]["name"])):
        allowed = [rule for rule in rules(objects) if plural in rule["resources"]]
        assert [(rule["resourceNames"], rule["verbs"]) for rule in allowed] == [([name], ["get", "patch"])]
    mine = {"customMetrics": {"enabled": True, "certificate": {"secretName": "mine", "caBundle": "PEM"}}}
    objects = render(mine)
    assert not of_kind(objects, "Secret") and of_kind(objects, "APIService")[0]["spec"]["caBundle"] == "UEVN"
    pod = of_kind(objects, "Deployment", "gantline")[0]["spec"]["template"]["spec"]
    assert {"name": "custom-metrics", "secret": {"secretName": "mine"}} in pod["volumes"]
    assert "GANTLINE_CUSTOM_METRICS_SECRET" not in operator_environment(mine)
    assert not [rule for rule in rules(objects) if {"secrets", "apiservices"} & set(rule["resources"])]


def test_defaults_of_the_chart_are_the_operators_own() -> None:
    assert from_environment(operator_environment({})) == OperatorSettings(**OF_THE_RELEASE)


def test_what_is_set_reaches_the_operators_pods() -> None:
    objects = render(INSTALLATIONS["everything"])
    for pod in pod_specs(objects):
        assert pod["imagePullSecrets"] == [{"name": "own"}] and pod["priorityClassName"] == "system-cluster-critical"
        assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"} and pod["tolerations"] == [{"key": "system", "operator": "Exists"}]
        assert pod["containers"][0]["image"] == "registry.example/operator:1.2.3" and pod["containers"][0]["imagePullPolicy"] == "Always"
    template = of_kind(objects, "Deployment")[0]["spec"]["template"]["metadata"]
    assert template["annotations"]["example.com/a"] == "b" and template["labels"]["example.com/c"] == "d"
    inventory = of_kind(objects, "ConfigMap", "gantline-inventory")[0]
    assert yaml.safe_load(inventory["data"]["pools"]) == INSTALLATIONS["everything"]["inventory"]["pools"]
    readers = of_kind(objects, "Role", "gantline-inventory")[0]["rules"]
    assert readers == [{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["gantline-inventory"], "verbs": ["get"]}]


def test_the_webhook_is_for_the_namespaces_that_are_served_and_may_touch_two_objects_by_name() -> None:
    values = {"webhook": {"enabled": True}, "rbac": {"scope": "namespace"}, "watchNamespaces": ["team-a", "team-b"]}
    objects = render(values)
    webhook = of_kind(objects, "ValidatingWebhookConfiguration", "gantline-gantline-system")[0]["webhooks"][0]
    assert (webhook["failurePolicy"], webhook["timeoutSeconds"], webhook["sideEffects"]) == ("Ignore", 5, "None")
    assert webhook["namespaceSelector"]["matchExpressions"][0]["values"] == ["team-a", "team-b"]
    given = operator_environment(values)
    assert given["GANTLINE_WEBHOOK_HOSTS"] == f"{webhook['clientConfig']['service']['name']}.gantline-system.svc"
    assert webhook["clientConfig"]["service"]["path"] == PATH
    secret, configuration = given["GANTLINE_WEBHOOK_SECRET"].partition("/")[2], given["GANTLINE_WEBHOOK_CONFIGURATION"]
    for kind, name in (("Secret", secret), ("ValidatingWebhookConfiguration", configuration)):
        assert of_kind(objects, kind, name)
        allowed = [rule for rule in rules(objects) if f"{kind.lower()}s" in rule["resources"]]
        assert [(rule["resourceNames"], rule["verbs"]) for rule in allowed] == [([name], ["get", "patch"])]
    assert not of_kind(render(), "ValidatingWebhookConfiguration") and not of_kind(render(), "Secret")


def test_two_operators_share_a_lease_and_are_never_both_away() -> None:
    objects = render({"replicaCount": 2})
    spec = of_kind(objects, "Deployment")[0]["spec"]
    assert spec["replicas"] == 2 and spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    spread = spec["template"]["spec"]["topologySpreadConstraints"][0]
    budget = of_kind(objects, "PodDisruptionBudget")[0]["spec"]
    assert budget["maxUnavailable"] == 1 and spread["whenUnsatisfiable"] == "ScheduleAnyway"
    for selector in (budget["selector"], spread["labelSelector"]):
        assert selector["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    lease = of_kind(objects, "Role", "gantline-lease")[0]
    assert operator_environment({"replicaCount": 2})["GANTLINE_LEASE"] == f"{lease['metadata']['namespace']}/gantline"
    assert [(rule["verbs"], rule.get("resourceNames")) for rule in lease["rules"]] == [(["create"], None), (["get", "patch"], ["gantline"])]


def test_one_operator_runs_and_is_replaced_not_doubled() -> None:
    assert not of_kind(render(), "PodDisruptionBudget", "gantline")
    spec = of_kind(render(), "Deployment")[0]["spec"]
    assert spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}
    assert spec["template"]["spec"]["enableServiceLinks"] is False, "a Service named gantline would set GANTLINE_* variables"
    container = spec["template"]["spec"]["containers"][0]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"metrics": 8080, "health": 8081}


def test_no_release_owns_the_crd_so_that_uninstalling_keeps_it_and_another_release_may_upgrade_it() -> None:
    objects = render()
    assert not of_kind(objects, "CustomResourceDefinition")
    assert not (CHART / "crds").exists(), "Helm installs what lies there and never upgrades it"
    job = of_kind(objects, "Job", "gantline-crds")[0]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == ["python", "-m", install_crds_main.__module__]
    assert not [item for item in render(INSTALLATIONS["nothing-extra"]) if "crds" in item["metadata"]["name"]]


def test_the_hook_may_touch_our_definition_only() -> None:
    role = of_kind(render(), "ClusterRole", "gantline-crds-gantline-system")[0]
    assert [(rule["verbs"], rule.get("resourceNames")) for rule in role["rules"]] == [
        (["create"], None),
        (["get", "patch"], ["inferenceservices.gantline.io"]),
    ]


def test_the_test_pod_has_rights_of_its_own_where_it_makes_its_service() -> None:
    objects = render(INSTALLATIONS["two-namespaces"])
    pod = of_kind(objects, "Pod", "gantline-test")[0]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test" and pod["metadata"]["namespace"] == "gantline-system"
    assert "--namespace=team-a" in pod["spec"]["containers"][0]["args"]
    role = of_kind(objects, "Role", "gantline-test")[0]
    assert role["metadata"]["namespace"] == "team-a"
    verbs = [(rule["verbs"], rule.get("resourceNames")) for rule in role["rules"]]
    assert verbs == [(["create"], None), (["get", "delete"], ["gantline-test"])]


def test_two_releases_share_no_name() -> None:
    releases = [render(release=release, namespace=at) for release, at in (("gantline", "a"), ("other", "a"), ("gantline", "b"))]
    first, second, third = (
        {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects} for objects in releases
    )
    assert not first & second and not first & third
    assert len(first) == len(releases[0]), "no object is rendered twice"


def test_the_longest_release_name_still_makes_legal_names() -> None:
    for item in render(release="r" * 53):
        limit = 253 if item["kind"].startswith("ClusterRole") else 63
        assert len(item["metadata"]["name"]) <= limit and all(len(value) <= 63 for value in item["metadata"]["labels"].values())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"imagePullPolicy": "Always"}, "imagePullPolicy"),
        ({"runtime": {"images": {"cude": "x"}}}, "cude"),
        ({"rbac": {"scope": "world"}}, "scope"),
        ({"operator": {"workers": 0}}, "workers"),
        ({"operator": {"workers": "many"}}, "workers"),
        ({"watchNamespaces": ["Team"]}, "watchNamespaces"),
        ({"watchNamespaces": ["team-a"]}, "not"),
        ({"image": {"repository": "has space"}}, "repository"),
        ({"test": {"modelUri": "s3://bucket/x"}}, "modelUri"),
        ({"crds": {"keep": True}}, "keep"),
        ({"replicaCount": 3}, "replicaCount"),
        ({"gateway": {"replicas": 0}}, "replicas"),
        ({"gateway": {"apiKeys": {"secret": "x"}}}, "secret"),
        ({"gateway": {"ingress": {"host": "no host"}}}, "host"),
        ({"gateway": {"tls": {"secretName": "No_Name"}}}, "secretName"),
        ({"gateway": {"corsOrigins": ["app.example.com"]}}, "corsOrigins"),
        ({"gateway": {"service": {"port": "https"}}}, "port"),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "parentRefs is needed"),
        ({"gateway": {"enabled": False}, "runtime": {"networkPolicy": {"enabled": True, "clients": "gateway"}}}, "needs gateway.enabled"),
        ({"runtime": {"networkPolicy": {"enabled": True, "alsoFrom": ["monitoring"]}}}, "goes with clients: gateway"),
    ],
)
def test_unknown_and_illegal_values_are_refused_by_name(values: Object, named: str) -> None:
    result = run_helm("template", "gantline", str(CHART), values={**MINIMUM, **values})
    assert result.returncode != 0 and named in result.stderr, result.stderr


def test_without_an_image_the_message_says_what_to_do() -> None:
    result = run_helm("template", "gantline", str(CHART))
    assert result.returncode != 0 and "image.repository is needed: build the Dockerfile's target" in result.stderr


def test_every_value_is_known_to_the_schema_and_documented() -> None:
    text = (CHART / "values.yaml").read_text()
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert set(yaml.safe_load(text)) == set(schema["properties"]) - {"global"}
    for part in ("image", "runtime", "rbac", "webhook", "crds", "inventory", "operator", "metrics", "test", "serviceAccount", "gateway"):
        assert set(yaml.safe_load(text)[part]) == set(schema["properties"][part]["properties"])
        assert schema["properties"][part]["additionalProperties"] is False


def test_chart_operator_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_notes_show_a_first_service_that_would_work() -> None:
    values = {**MINIMUM, **INSTALLATIONS["two-namespaces"]}
    result = run_helm("install", "gantline", str(CHART), "--dry-run=client", "--namespace", "n", values=values)
    assert result.returncode == 0, result.stderr
    notes = result.stdout.partition("NOTES:")[2]
    assert "No runtime image is set" in notes and "serves the namespaces team-a, team-b" in notes
    manifest = yaml.safe_load(notes.partition("<<EOF")[2].partition("EOF")[0])
    assert manifest["metadata"] == {"name": "chat", "namespace": "team-a"}
    assert parse_service(manifest)[0] == "chat"
