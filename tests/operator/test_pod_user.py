"""Whom pods run as, where the cluster gives every namespace users of its own and refuses all others, as OpenShift does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import resources
from gantline_operator.settings import from_environment
from gantline_runtime.errors import ConfigurationError

from tests.operator.harness import (
    SETTINGS,
    TINY,
    answer,
    apply,
    fates,
    inspected,
    install_crd,
    items,
    server_pods,
    service,
    serving,
    volume,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest

Object = dict[str, Any]

REFUSED = "pods of this namespace may not choose their users"
_POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
_BINDINGS = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"


@pytest.fixture
def strict(api_cluster: ApiCluster, namespace: str) -> Iterator[ApiCluster]:
    """The cluster with a policy for the test's namespace that says what OpenShift's `restricted-v2` says of users."""
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    given = "has(object.spec.securityContext) && ({})".format(
        " || ".join(f"has(object.spec.securityContext.{part})" for part in ("runAsUser", "runAsGroup", "fsGroup"))
    )
    name = f"users-{namespace}"
    where = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    rules = [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"]}]
    policy = {
        "failurePolicy": "Fail",
        "matchConstraints": {"resourceRules": rules},
        "validations": [{"expression": f"!({given})", "message": REFUSED}],
    }
    api_cluster.client.post(_POLICIES, {"metadata": {"name": name}, "spec": policy})
    binding = {"policyName": name, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": where}}
    api_cluster.client.post(_BINDINGS, {"metadata": {"name": name}, "spec": binding})
    try:
        yield api_cluster
    finally:
        for path in (_BINDINGS, _POLICIES):
            api_cluster.client.call("DELETE", f"{path}/{name}")


def test_services_run_where_the_cluster_gives_out_users(strict: ApiCluster, namespace: str) -> None:
    """Every stage's pods and the server's."""
    fetched = answer(artefact={"kind": "fetch", "bytes": TINY["weightBytes"]})
    fates(strict, [*inspected(shift={**TINY, "revision": "abc"}), ("fetch", "shift", "complete", fetched, {})])
    volume(strict, namespace, "shift-cache")
    with serving(strict, namespace, pod_user=None):
        apply(strict, service("shift", namespace, model={"uri": "hf://org/name"}))
        wait_reason(strict, "shift", namespace, "Ready")
        assert_at_rest(strict, namespace, settings=replace(SETTINGS, pod_user=None))
        pods = [*server_pods(strict, "shift", namespace), *items(strict, "jobs", namespace)]
        specs = [item["spec"].get("template", item)["spec"] for item in pods]
        assert len(specs) == 3 and all(spec["securityContext"]["runAsNonRoot"] for spec in specs)


@pytest.mark.parametrize(("value", "user"), [("1000", 1000), ("cluster", None), ("1001", 1001)])
def test_the_setting_names_a_user_or_leaves_it_to_the_cluster(value: str, user: int | None) -> None:
    settings = from_environment({"GANTLINE_POD_USER": value})
    assert resources.Settings.of(settings, "1").pod_user == user


@pytest.mark.parametrize("value", ["root", "0", "-1", ""])
def test_what_is_no_user_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="GANTLINE_POD_USER"):
        from_environment({"GANTLINE_POD_USER": value})
