"""The chart on a real API server: strictly valid, rights that suffice and end there, installed, upgraded, uninstalled, renamed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError, Client
from gantline_operator import chart_test, install_crds
from gantline_operator.crd import build_crd

from tests.operator.applying import CLUSTER_WIDE, apply, path_of
from tests.operator.definition import wait_until_served
from tests.operator.helm import CHART, MINIMUM, render, run_helm
from tests.operator.render_cases import CASES
from tests.operator.test_chart import INSTALLATIONS, of_kind

Object = dict[str, Any]
DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceservices.gantline.io"


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


def run_program(cluster: ApiCluster, account: tuple[str, str], main: Callable[[list[str]], int], *arguments: str) -> Finished:
    """One of the chart's programs, with the rights of a ServiceAccount and nothing else."""
    kubeconfig = cluster.service_account_kubeconfig(*account)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["--kubeconfig", str(kubeconfig), *arguments])
    return Finished(code, out.getvalue(), err.getvalue())


def may(cluster: ApiCluster, account: tuple[str, str], verb: str, kind: str) -> bool:
    """Whether a ServiceAccount may do `verb` to `group/resource/subresource` in all namespaces, as the API server answers it itself."""
    group, resource, subresource = (kind.split("/") + [""])[:3]
    attributes = {"verb": verb, "group": group, "resource": resource, "subresource": subresource}
    client = Client(cluster.service_account_kubeconfig(*account))
    try:
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}
        return bool(client.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)["status"]["allowed"])
    finally:
        client.close()


@pytest.fixture(scope="module")
def definition(api_cluster: ApiCluster) -> ApiCluster:
    """The cluster, with our CustomResourceDefinition served."""
    api_cluster.client.apply(DEFINITION, build_crd(), "gantline-operator")
    wait_until_served(api_cluster)
    return api_cluster


@pytest.fixture
def installed_rights(api_cluster: ApiCluster, namespace: str) -> Iterator[list[Object]]:
    """All objects of the chart in `namespace`, of which the rights are in force."""
    objects = render(namespace=namespace)
    rights = [item for item in objects if item["kind"] == "ServiceAccount" or item["apiVersion"].startswith("rbac.")]
    for item in rights:
        apply(api_cluster.client, item)
    yield objects
    for item in rights:
        if item["kind"] in CLUSTER_WIDE:
            api_cluster.client.call("DELETE", path_of(item))


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_the_api_server_accepts_every_object_strictly(api_cluster: ApiCluster, namespace: str, name: str) -> None:
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    api_cluster.client.call("PATCH", f"/api/v1/namespaces/{namespace}", label, content_type="application/merge-patch+json")
    objects = render({**INSTALLATIONS[name], "watchNamespaces": []}, namespace=namespace)
    for item in of_kind(objects, "ServiceAccount"):  # the test's pod is judged with its account there
        apply(api_cluster.client, item)
    for item in objects:
        if item["metadata"].get("namespace") in (None, namespace):
            apply(api_cluster.client, item, dry_run=True)
    for name, template in ((item["metadata"]["name"], item["spec"]["template"]) for item in objects if "template" in item.get("spec", {})):
        pod = {"metadata": {"name": name, **template["metadata"]}, "spec": template["spec"]}
        api_cluster.client.post(f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict", pod)


def test_the_hook_applies_the_definition_with_its_own_rights_and_may_do_nothing_else(
    api_cluster: ApiCluster, namespace: str, installed_rights: list[Object]
) -> None:
    account = (namespace, "gantline-crds")
    first = run_program(api_cluster, account, install_crds.main)
    assert first.returncode == 0 and "inferenceservices.gantline.io is served" in first.stdout, first.stderr
    version = api_cluster.client.get(DEFINITION)["metadata"]["resourceVersion"]
    again = run_program(api_cluster, account, install_crds.main)
    assert again.returncode == 0 and api_cluster.client.get(DEFINITION)["metadata"]["resourceVersion"] == version
    definitions = "apiextensions.k8s.io/customresourcedefinitions"
    for verb, kind in (("delete", definitions), ("patch", definitions), ("list", "/secrets"), ("list", "/nodes")):
        assert not may(api_cluster, account, verb, kind), (verb, kind)


def test_the_hook_upgrades_a_definition_that_somebody_else_made(
    api_cluster: ApiCluster, namespace: str, installed_rights: list[Object]
) -> None:
    older = build_crd()
    older["spec"]["names"]["shortNames"] = ["older"]
    api_cluster.client.apply(DEFINITION, older, "kubectl")
    assert run_program(api_cluster, (namespace, "gantline-crds"), install_crds.main).returncode == 0
    assert api_cluster.client.get(DEFINITION)["spec"]["names"]["shortNames"] == ["gisvc"]


def test_the_hook_without_rights_says_so_and_fails(api_cluster: ApiCluster, namespace: str) -> None:
    api_cluster.kubectl("create", "serviceaccount", "nobody", "-n", namespace)
    result = run_program(api_cluster, (namespace, "nobody"), install_crds.main, "--timeout-seconds=5")
    assert result.returncode == 1 and "was not applied" in result.stderr and "forbidden" in result.stderr


def test_the_operators_rights_suffice_for_all_that_it_makes_and_end_there(
    api_cluster: ApiCluster, namespace: str, installed_rights: list[Object]
) -> None:
    operator = Client(api_cluster.service_account_kubeconfig(namespace, "gantline"))
    for item in CASES["hub-to-gpu"].objects():
        if item["kind"] == "PersistentVolumeClaim":
            live = operator.post(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", {**item, "metadata": {"name": "made-once"}})
        else:
            live = apply(operator, item, namespace=namespace)
        operator.get(path_of(live))
        operator.get(path_of(live).rpartition("/")[0])
        operator.call("DELETE", path_of(live))
    operator.close()
    account = (namespace, "gantline")
    allowed = [("list", "/nodes"), ("watch", "/pods"), ("patch", "gantline.io/inferenceservices/status"), ("get", "/pods/log")]
    refused = [
        *(("get", kind) for kind in ("/secrets", "/configmaps")),
        *(("create", kind) for kind in ("/pods", "/pods/exec", "/serviceaccounts/token", "rbac.authorization.k8s.io/clusterroles")),
        *(("patch", kind) for kind in ("/nodes", "gantline.io/inferenceservices")),
    ]
    assert [access for access in allowed + refused if may(api_cluster, account, *access)] == allowed


def test_install_upgrade_uninstall_and_install_under_another_name(
    definition: ApiCluster, simulated_nodes: ApiCluster, namespace: str
) -> None:
    """The hook's pod is simulated here, so the definition is applied beforehand; the hook itself is tested above."""
    cluster = simulated_nodes
    cluster.simulate("cpu", 1)
    service = f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices"
    cluster.client.post(service, chart_test.build_service("kept", namespace, "file:///m"))

    flags = ["--kubeconfig", str(cluster.kubeconfig), "--namespace", namespace]
    steps = [("install", "gantline"), ("upgrade", "gantline"), ("uninstall", "gantline"), ("install", "other"), ("uninstall", "other")]
    for verb, release in steps:
        given = [] if verb == "uninstall" else [str(CHART), "--wait", "--timeout", "60s"]
        result = run_helm(verb, release, *given, *flags, values=None if verb == "uninstall" else MINIMUM)
        assert result.returncode == 0, f"{verb} {release}: {result.stderr}"
        assert cluster.client.get(f"{service}/kept")["metadata"]["name"] == "kept", "the definition and the services stay"
    assert "meta.helm.sh/release-name" not in cluster.client.get(DEFINITION)["metadata"].get("annotations", {})


class Answering(BaseHTTPRequestHandler):
    """Speaks as much of the chat API as one request needs, and remembers what it was asked."""

    asked: list[Object] = []
    status, text = 200, "It joins paths."

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        body = json.dumps({"choices": [{"message": {"content": self.text}}]}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def acting_operator(cluster: ApiCluster, namespace: str, handler: type[Answering], *, ready: bool = True) -> Iterator[None]:
    """Writes the status that an operator would, with the address of a server of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    url = f"http://127.0.0.1:{server.server_port}"
    stopped = threading.Event()
    client = Client(cluster.kubeconfig)

    def act() -> None:
        path = f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices/gantline-test"
        since = "2026-01-01T00:00:00Z"
        condition = {"type": "Ready", "status": str(ready), "reason": "Loading", "lastTransitionTime": since}
        while not stopped.wait(0.2):
            try:
                body = {"status": {"url": url, "conditions": [condition]}}
                client.call("PATCH", f"{path}/status", body, content_type="application/merge-patch+json")
            except ApiError as error:
                assert error.status == 404, error

    threads = [threading.Thread(target=act), threading.Thread(target=server.serve_forever)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join()
        client.close()


def run_test_pod(cluster: ApiCluster, namespace: str, objects: list[Object], *more: str) -> Finished:
    container = of_kind(objects, "Pod", "gantline-test")[0]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", chart_test.__name__]
    return run_program(cluster, (namespace, "gantline-test"), chart_test.main, *container["args"], *more)


def services(cluster: ApiCluster, namespace: str) -> list[Object]:
    items: list[Object] = cluster.client.get(f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices")["items"]
    return items


def test_helm_tests_program_asks_its_service_and_deletes_it(definition: ApiCluster, namespace: str, installed_rights: list[Object]) -> None:
    api_cluster = definition
    handler = type("Handler", (Answering,), {"asked": []})
    with acting_operator(api_cluster, namespace, handler):
        result = run_test_pod(api_cluster, namespace, installed_rights)
    assert result.returncode == 0 and "answered: 'It joins paths.'" in result.stdout, result.stderr
    assert handler.asked[0]["model"] == "gantline-test" and not services(api_cluster, namespace)


@pytest.mark.parametrize(
    ("change", "ready", "said"),
    [
        ({"status": 503}, True, "answered 503"),
        ({"text": ""}, True, "the answer has no text"),
        ({}, False, "was not Ready in time; last: Loading"),
    ],
    ids=["error", "no-text", "never-ready"],
)
def test_helm_tests_program_fails_with_a_cause_and_leaves_nothing(
    definition: ApiCluster, namespace: str, installed_rights: list[Object], change: Object, ready: bool, said: str
) -> None:
    api_cluster = definition
    handler = type("Handler", (Answering,), {"asked": [], **change})
    with acting_operator(api_cluster, namespace, handler, ready=ready):
        result = run_test_pod(api_cluster, namespace, installed_rights, "--timeout-seconds=3")
    assert result.returncode == 1 and said in result.stderr, result.stderr
    assert not services(api_cluster, namespace)


def test_helm_tests_program_deletes_its_service_when_it_is_ended(
    definition: ApiCluster, namespace: str, installed_rights: list[Object]
) -> None:
    api_cluster = definition
    kubeconfig = api_cluster.service_account_kubeconfig(namespace, "gantline-test")
    arguments = of_kind(installed_rights, "Pod", "gantline-test")[0]["spec"]["containers"][0]["args"]
    command = [sys.executable, "-m", "gantline_operator.chart_test", *arguments]
    with subprocess.Popen(command, env={"KUBECONFIG": str(kubeconfig), "PATH": ""}, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not services(api_cluster, namespace) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "ended before it was done" in error and not services(api_cluster, namespace)
