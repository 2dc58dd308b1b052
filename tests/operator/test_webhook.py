"""Warnings at admission: kubectl on a real API server that asks the operator's webhook over TLS, under the chart's own rights."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_operator.certificates import upkeep
from gantline_operator.certificates.pairs import load_pair, make_pair, must_renew
from gantline_operator.certificates.trust import trust_of_webhooks
from gantline_operator.client import connect
from gantline_operator.web import serving_http
from gantline_operator.webhook.advice import LONGEST, MOST, advise
from gantline_operator.webhook.server import build_admission

from tests.operator.applying import apply as put
from tests.operator.harness import (
    FACTS,
    SETTINGS,
    Operator,
    fates,
    gpu_nodes,
    inspected,
    install_crd,
    patch,
    remove_gpu_nodes,
    service,
    wait,
    wait_reason,
)
from tests.operator.helm import render
from tests.operator.planning import IMAGES, MODELS, cluster_of, spec_of

Object = dict[str, Any]
CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HUGE: Object = {**FACTS, "numLayers": 2000, "weightBytes": 900_000_000_000, "fingerprint": "sha256:0c"}


@dataclass(frozen=True)
class Site:
    cluster: ApiCluster
    namespace: str
    place: Object
    """The spec that leads to its GPU nodes."""

    def apply(self, name: str, **spec: Any) -> subprocess.CompletedProcess[str]:
        manifest = service(name, self.namespace, **{**self.place, "model": {"uri": f"file:///models/{name}"}, **spec})
        return self.cluster.kubectl("apply", "-f", "-", input=json.dumps(manifest))

    def trusted(self) -> str:
        """The authorities that the API server trusts, in base64."""
        found = self.cluster.client.get(f"{CONFIGURATIONS}/gantline-{self.namespace}")
        return str(found["webhooks"][0]["clientConfig"].get("caBundle", ""))

    def kept(self) -> Object:
        """What the Secret holds."""
        found: Object = self.cluster.client.get(f"/api/v1/namespaces/{self.namespace}/secrets/gantline-webhook")
        return found.get("data") or {}


def chart_objects(namespace: str, port: int) -> list[Object]:
    """The chart's own, but that this API server reaches the operator by an address."""
    values = {"webhook": {"enabled": True}, "rbac": {"scope": "namespace", "readNodes": True}, "crds": {"install": False}}
    kinds = ("ServiceAccount", "Secret", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "ValidatingWebhookConfiguration")
    objects = [item for item in render(values, namespace=namespace) if item["kind"] in kinds]
    hook = next(item for item in objects if item["kind"] == "ValidatingWebhookConfiguration")["webhooks"][0]
    hook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{hook['clientConfig']['service']['path']}"}
    return [item for item in objects if "helm.sh/hook" not in item["metadata"].get("annotations", {})]


@contextmanager
def webhook(cluster: ApiCluster, namespace: str, port: int) -> Iterator[None]:
    """An operator with its webhook, as a release of the chart."""
    settings = replace(
        SETTINGS,
        watch_namespaces=(namespace,),
        webhook_port=port,
        webhook_hosts=("127.0.0.1",),
        webhook_secret=f"{namespace}/gantline-webhook",
        webhook_configuration=f"gantline-{namespace}",
    )
    with Operator(cluster, settings, kubeconfig=cluster.service_account_kubeconfig(namespace, "gantline")):
        yield


@pytest.fixture(scope="module")
def site(api_cluster: ApiCluster) -> Iterator[Site]:
    """GPU nodes, and a service of which the operator has long inspected the model; the chart's objects, but no operator."""
    namespace = "warned"
    cluster = api_cluster
    install_crd(cluster)
    cluster.client.post("/api/v1/namespaces", {"metadata": {"name": namespace}})
    fates(cluster, inspected(known=FACTS, enormous=HUGE))
    port = free_port()
    objects = chart_objects(namespace, port)
    for item in objects:
        if item["kind"] == "ValidatingWebhookConfiguration":  # as Helm does, under another field manager than the operator's
            cluster.client.post(CONFIGURATIONS, item)
        else:
            put(cluster.client, item)
    found = Site(cluster, namespace, gpu_nodes(cluster, namespace, "h100"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(upkeep, "_POLL_S", 0.5)
        patched.setattr(upkeep, "_SOON_S", 0.2)
        try:
            assert "created" in found.apply("early", accelerator={"resource": "nvidia.com/gpu", "nodeSelector": {"for": "nobody"}}).stdout
            with webhook(cluster, namespace, port):
                wait(found.trusted)
                yield found
            silent = found.apply("late", accelerator={"resource": "nvidia.com/gpu", "nodeSelector": {"for": "nobody"}})
            assert "created" in silent.stdout and not silent.stderr, "a webhook that is away costs nobody an apply"
        finally:
            for item in objects:
                if item["kind"].startswith(("Cluster", "Validating")):
                    cluster.kubectl("delete", item["kind"], item["metadata"]["name"])
            remove_gpu_nodes(cluster, namespace)
            cluster.client.call("DELETE", f"/api/v1/namespaces/{namespace}")


def test_before_a_model_is_known_devices_and_labels_are_judged(site: Site) -> None:
    nobody = {"accelerator": {"resource": "auto", "nodeSelector": {"for": "nobody"}}}

    def told() -> str:
        """Once the API server has taken up the new authority, which takes it a moment."""
        said = site.apply("typo", **nobody).stderr
        if not said:
            site.cluster.kubectl("delete", "gisvc", "typo", "-n", site.namespace)
        return said

    said = wait(told)
    assert "Warning: NoMatchingGPU: no pod would be started" in said and "nodeSelector" in said
    assert "Warning: Add such GPUs, widen spec.accelerator" in said
    assert site.cluster.kubectl("get", "gisvc", "typo", "-n", site.namespace).returncode == 0, "it is stored all the same"


def test_of_a_known_model_the_whole_plan_is_told_where_it_is_no_plain_yes(site: Site) -> None:
    plain = site.apply("known")
    assert "created" in plain.stdout and not plain.stderr
    wait_reason(site.cluster, "known", site.namespace, "Ready")
    crowd = site.apply("known", replicas=9)
    assert "Warning: WaitingForCapacity: too few are free now for 9 replicas on 1 x NVIDIA-H100-80GB-HBM3" in crowd.stderr
    patch(site.cluster, "known", site.namespace, {"replicas": 1})
    split = site.apply("known", engine={"sessionLen": 8192, "maxBatchSize": 4096, "cacheMaxEntryCount": "0.05"})
    assert "Warning: Planned: tensor parallelism" in split.stderr, split.stderr
    marked = site.cluster.kubectl("annotate", "gisvc/known", "-n", site.namespace, "example.com/note=x")
    assert not marked.stderr, "nothing of the spec changed"


def test_a_model_that_fits_nowhere_is_told_before_it_is_stored_again(site: Site) -> None:
    site.apply("enormous")
    wait_reason(site.cluster, "enormous", site.namespace, "NeedsSeveralNodes", "PlanResolved")
    again = site.apply("enormous", replicas=2)
    assert "configured" in again.stdout and "Warning: NeedsSeveralNodes: no pod would be started" in again.stderr


STRANGER = make_pair(["127.0.0.1"], datetime.now(UTC))
NAMES = iter(range(1000))


@pytest.mark.parametrize("harm", [None, {"tls.key": STRANGER.key}, {"ca.crt": STRANGER.authority}, {"ca.crt": "none", "tls.key": ""}])
def test_the_certificate_is_renewed_while_it_serves_and_mended_where_it_was_torn_apart(site: Site, harm: dict[str, str] | None) -> None:
    before = site.trusted()
    data = {key: base64.b64encode(text.encode()).decode() for key, text in harm.items()} if harm else None
    body = json.dumps({"data": data})
    site.cluster.kubectl("patch", "secret", "gantline-webhook", "-n", site.namespace, "--type=merge", "-p", body)
    wait(lambda: site.trusted() != before)
    wait(lambda: site.kept().get("ca.crt") == site.trusted())
    selector = {"resource": "auto", "nodeSelector": {"for": "nobody"}}
    wait(lambda: site.apply(f"renewed-{next(NAMES)}", accelerator=selector).stderr)


def test_the_authority_before_goes_on_to_be_trusted() -> None:
    """Of what a replica serves that has not read the new certificate yet; the one before that is dropped."""
    first, second, third = (make_pair(["127.0.0.1"], datetime.now(UTC)).authority for _ in range(3))
    bundle = second + upkeep._first_certificate(first)
    assert third + upkeep._first_certificate(bundle) == third + second
    assert len(ssl.create_default_context(cadata=bundle).get_ca_certs()) == 2


async def test_a_replica_that_waits_makes_no_certificate_and_serves_the_leaders(site: Site) -> None:
    """Both are behind the Service."""
    client = await connect(str(site.cluster.kubeconfig))

    def replica(leads: bool, hosts: tuple[str, ...]) -> upkeep.Upkeep:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        secret, trust = f"{site.namespace}/gantline-webhook", trust_of_webhooks(f"gantline-{site.namespace}")
        return upkeep.Upkeep(client, secret, trust, hosts, partial(load_pair, context), lambda: leads)

    wait(lambda: site.kept().get("tls.crt"))
    kept = site.kept()["tls.crt"]
    waiting = replica(False, ("127.0.0.1",))
    await waiting.look()
    assert base64.b64decode(kept).decode() == waiting._loaded
    unsuited = replica(False, ("another.svc",))
    await unsuited.look()
    assert not unsuited._loaded and site.kept()["tls.crt"] == kept
    await client.close()


@pytest.mark.parametrize(
    ("certificate", "hosts", "days", "renewed"),
    [
        ("made", ["a.svc"], 0, False),
        ("made", ["a.svc"], 59, False),
        ("made", ["a.svc"], 61, True),
        ("made", ["b.svc"], 0, True),
        ("made", ["a.svc"], -1, True),
        ("", ["a.svc"], 0, True),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ["a.svc"], 0, True),
    ],
)
def test_a_certificate_is_renewed_in_time_and_for_other_names(certificate: str, hosts: list[str], days: int, renewed: bool) -> None:
    pem = make_pair(["a.svc"], NOW).certificate if certificate == "made" else certificate
    assert must_renew(pem, hosts, NOW + timedelta(days=days)) is renewed


@pytest.mark.parametrize(
    ("model", "profile", "spec", "words"),
    [
        ("8b", "h100", {}, []),
        ("8b", "h100", {"engine": {"sessionLen": 8192}}, []),
        ("70b", "h100", {"engine": {"sessionLen": 8192}}, ["tensor parallelism 4: each replica takes 4 x NVIDIA-H100-80GB-HBM3"]),
        ("70b", "l4", {}, ["NeedsSeveralNodes: no pod would be started", "or lower engine.sessionLen"]),
        ("70b", "h100", {"suspend": True}, []),
        ("70b", "h100", {"replicas": 0}, []),
        (None, "h100", {}, []),
        (None, "h100", {"accelerator": {"resource": "cpu"}}, ["NoMatchingNode"]),
        (None, "t4-shared", {}, ["NoMatchingGPU", "allowShared"]),
        (None, "mi300x", {"engine": {"backend": "cuda"}}, ["UnsupportedGPU"]),
    ],
)
def test_advice_is_what_the_plan_says_where_it_is_no_plain_yes(model: str | None, profile: str, spec: Object, words: list[str]) -> None:
    cluster = cluster_of(profile)
    if spec.get("accelerator", {}).get("resource") == "cpu":
        spec = {"accelerator": {"resource": "cpu", "nodeSelector": {"no": "node"}}}
    told = advise(spec_of(**spec), MODELS[model] if model else None, cluster, IMAGES)
    assert bool(told) == bool(words) and len(told) <= MOST and all(len(text) <= LONGEST for text in told), told
    for word in words:
        assert any(word in text for text in told), told


def test_nothing_free_is_told_before_the_model_is_known() -> None:
    full = cluster_of("h100", used={"h100-0": 8})
    assert "WaitingForCapacity: nothing is free now" in advise(spec_of(), None, full, IMAGES)[0]


async def test_a_judge_that_fails_or_a_body_that_is_none_is_no_refusal(tmp_path: Path) -> None:
    pair = make_pair(["127.0.0.1"], datetime.now(UTC))
    (tmp_path / "pair.pem").write_text(pair.certificate + pair.key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "pair.pem")
    results: list[str] = []

    async def judge(request: Object) -> list[str]:
        raise KeyError("defect")

    port = free_port()

    def ask(body: bytes) -> tuple[int, bytes]:
        url = f"https://127.0.0.1:{port}/validate"
        try:
            with urllib.request.urlopen(url, data=body, timeout=60, context=ssl.create_default_context(cadata=pair.authority)) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    async with serving_http(build_admission(judge, results.append), "127.0.0.1", port, context):
        status, body = await asyncio.to_thread(ask, json.dumps({"request": {"uid": "u"}}).encode())
        assert status == 200 and json.loads(body)["response"] == {"uid": "u", "allowed": True} and results == ["error"]
        for odd in (b"", b"[]", b"{" * 5000, b'{"request": {"uid": 3}}'):
            assert (await asyncio.to_thread(ask, odd))[0] == 400
