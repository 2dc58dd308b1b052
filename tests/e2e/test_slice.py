"""From `kubectl apply` to streamed tokens, and what a Kubernetes user expects around it, on a real node."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gantline_devcluster.node.images import HOME, RUNTIME_IMAGE
from openai import APIConnectionError, APIStatusError, InternalServerError, OpenAI

from tests.e2e.conftest import ROOT, Site, make
from tests.e2e.streams import Streams
from tests.runtime.certificate_files import make_certificate, shown_subject
from tests.runtime.hub_server import COMMIT
from tests.runtime.registry_server import USER
from tests.runtime.s3_server import ACCESS_KEY

pytestmark = [pytest.mark.node, pytest.mark.timeout(900)]
TINY = "file:///opt/gantline/tiny-model"
HUB = "hub"
FULL = os.environ.get("GANTLINE_FULL_MATRIX") == "1"


def service(name: str, uri: str = TINY, **spec: Any) -> dict[str, Any]:
    body = {"model": {"uri": uri}, "accelerator": {"resource": "cpu"}, **spec}
    return {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": {"name": name}, "spec": body}


def server_pods(site: Site) -> dict[str, str]:
    """uid of each serving pod, by its revision."""
    pods = (site.get("pods", "-l", "gantline.io/service=chat,gantline.io/role=server") or {"items": []})["items"]
    return {p["metadata"]["uid"]: p["metadata"]["labels"].get("gantline.io/revision", "") for p in pods}


def ready(site: Site, name: str) -> bool:
    return site.condition(name, "Ready").get("status") == "True"


def test_the_quickstart_ends_with_an_answer_and_with_commands_that_work(site: Site) -> None:
    assert re.search(r"chat {2}\S+", site.output), site.output
    source = re.search(r"^  (source .*)$", site.output, re.M)
    curl = re.search(r"^  (curl .*\\\n.*)$", site.output, re.M)
    commands = re.findall(r"^  (kubectl (?:get|describe|explain|logs) .*)$", site.output, re.M)
    assert source and curl and len(commands) >= 5, site.output
    for command in (*commands, curl[1]):
        shell = ("bash", "-c", f"{source[1]} && {command}")
        done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=60)  # a user's shell, which knows nothing yet
        assert done.returncode == 0 and done.stdout.strip(), f"{command}\n{done.stderr}"
    assert json.loads(done.stdout)["choices"][0]["text"]


def test_the_columns_tell_what_runs(site: Site) -> None:
    head, row = site.kubectl("get", "gisvc").splitlines()[:2]
    assert head.split() == ["NAME", "READY", "REASON", "MODEL", "BACKEND", "TP", "REPLICAS", "URL", "AGE"]
    assert row.split()[:2] == ["chat", "True"] and "torch" in row and "http://chat.default.svc" in row


def test_the_model_was_quantized_in_a_job_and_the_result_is_judged(site: Site) -> None:
    status = site.get("gisvc", "chat")["status"]
    artefact = next(a for a in status["artefacts"] if a["kind"] == "awq")
    assert float(artefact["perplexity"]["after"]) < 1.1 * float(artefact["perplexity"]["before"])
    assert status["observedGeneration"] == site.get("gisvc", "chat")["metadata"]["generation"]
    assert all(c["observedGeneration"] == status["observedGeneration"] for c in status["conditions"])
    arguments = site.get("deployment", "chat")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert any(artefact["hash"] in argument for argument in arguments), arguments


def test_what_its_start_took_is_told_and_kept_and_its_cache_is_noted(site: Site) -> None:
    site.until("the pod has told", lambda: "weights" in site.get("gisvc", "chat")["status"]["startup"].get("phases", {}))
    data = site.kubectl("get", "configmap", "gantline-calibration", "-n", "gantline-system", "-o", "jsonpath={.data.measurements}")
    learnt = json.loads(data)
    (measured,) = (item for key, item in learnt.items() if "/cpu/1/awq4/" in key)
    assert 0 < measured["ratios"]["context"] < 1.5 and measured["loadSeconds"] > 0
    note = json.loads(site.get("pvc", "chat-cache")["metadata"]["annotations"]["gantline.io/cache"])
    (name, entry), *rest = note["artefacts"].items()
    assert name.startswith("awq-") and entry["made"] and entry["users"][0].startswith("chat.") and not rest
    verified = site.kubectl("exec", "deployment/chat", "--", "gantline", "verify", f"/mnt/cache/{name}")
    assert "as they were published" in verified


def test_wait_for_ready_returns_at_once(site: Site) -> None:
    site.kubectl("wait", "--for=condition=Ready", "gisvc/chat", "--timeout=5s")


def test_an_unchanged_openai_client_streams_tokens(site: Site) -> None:
    client = OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
    question = [{"role": "user", "content": "What does os.path.join do?"}]
    stream = client.chat.completions.create(model="chat", messages=question, stream=True, max_tokens=32, temperature=0)  # type: ignore[arg-type]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    whole = client.chat.completions.create(model="chat", messages=question, max_tokens=32, temperature=0)  # type: ignore[arg-type]
    assert streamed.strip() and streamed == whole.choices[0].message.content


def test_a_bad_request_gets_openais_error_shape_through_the_service(site: Site) -> None:
    done = site.run("curl", "-s", f"{site.url}/v1/chat/completions", "-d", '{"model": "nope", "messages": []}')
    assert set(json.loads(done.stdout)["error"]) == {"message", "type", "param", "code"}


def test_scaling_follows_kubectl_and_fewer_replicas_by_load_cut_no_stream(site: Site) -> None:
    """Pods go when their servers say that the last stream has ended. That one had streams when it was told to end is most likely, and is
    looked at again where it was not so."""
    assert any(scale_down_under_streams(site) for _ in range(3)), "no replica had a stream when it was told to end"
    assert site.kubectl("get", "gisvc/chat", "-o", "jsonpath={.status.selector}")


def scale_down_under_streams(site: Site) -> int:
    """By kubectl to two replicas, by load to one again, with streams on both that all come to their ends. How many the one that went ran
    when it was told to end; 0 also where its log was lost with it."""
    site.kubectl("scale", "gisvc/chat", "--replicas=2")
    site.until("two replicas are ready", lambda: site.get("gisvc", "chat")["status"].get("readyReplicas") == 2, 180)
    enough_for_one = {"min": 1, "max": 2, "metric": "inflight", "target": 100, "downAfter": "1s"}
    follow = ["kubectl", "logs", "--follow", "--tail=-1", "-l", "gantline.io/service=chat,gantline.io/role=server"]
    with tempfile.TemporaryFile("w+") as file:
        logs = subprocess.Popen(follow, env=site.environment, stdout=file)
        try:
            with Streams(site.url, 3, tokens=100) as long, Streams(site.url, 3, tokens=40) as short:
                site.kubectl("patch", "gisvc/chat", "--type=merge", "-p", json.dumps({"spec": {"scaling": enough_for_one}}))
                site.until("one replica is left", lambda: len(server_pods(site)) == 1, 240)
        finally:
            logs.terminate()
            logs.wait()
        file.seek(0)
        told = [json.loads(line) for line in file if line.startswith("{") and '"dra' in line]
    assert {stream.how for stream in (*long.ended, *short.ended)} == {"length"}, (long.ended, short.ended)
    site.until("the status says why", lambda: site.get("gisvc", "chat")["status"].get("lastScale", {}).get("reason") == "LoadFell")
    site.kubectl("patch", "gisvc/chat", "--type=merge", "-p", '{"spec": {"scaling": null}}')
    print(f"{len(long.ended)} and {len(short.ended)} streams, longest {max(stream.seconds for stream in long.ended):.1f} s; {told}")
    return max((line["running"] for line in told if line["message"] == "draining"), default=0)


def test_scaling_follows_kubectl_down_to_zero_and_a_waiting_request_wakes_what_may_be_woken(site: Site) -> None:
    site.kubectl("scale", "gisvc/chat", "--replicas=0")
    site.until("no replica is left", lambda: not server_pods(site))
    client = OpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["chat"]
    with pytest.raises(InternalServerError, match="nothing wakes it"):
        client.completions.create(model="chat", prompt="The licence")
    site.kubectl("patch", "gisvc/chat", "--type=merge", "-p", '{"spec": {"scaling": {"min": 0, "max": 2}}}')
    site.until("the gateway takes requests again", lambda: streamed(client))
    assert site.get("gisvc", "chat")["spec"]["replicas"] == 1
    site.kubectl("patch", "gisvc/chat", "--type=merge", "-p", '{"spec": {"scaling": null}}')
    last = json.loads(site.kubectl("logs", "-n", "gantline-system", "deployment/gantline-gateway", "--tail=1"))
    assert last["outcome"] == "ok" and last["held_seconds"] > 1, "it was held until there was a replica"


def streamed(client: OpenAI) -> str:
    """The text of a short stream; nothing while the gateway refuses it at once."""
    try:
        stream = client.completions.create(model="chat", prompt="The licence", max_tokens=24, stream=True)
    except InternalServerError as error:
        assert error.code == "scaled_to_zero", error
        return ""
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_top_reads_the_load_of_real_replicas_through_the_api_server(site: Site) -> None:
    table = site.run(sys.executable, "-m", "gantline_operator.kubectl.command", "top", "chat").stdout.splitlines()
    assert table[0].split()[:5] == ["SERVICE", "REPLICAS", "RUNNING", "WAITING", "TOKENS/S"]
    assert re.fullmatch(r"chat +1/1 +0 +0 +0\.0 +\d+% +Ready", table[1]) and len(table) == 2, table


def test_logs_of_operator_job_and_runtime_can_be_read(site: Site) -> None:
    assert site.kubectl("logs", "-n", "gantline-system", "deployment/gantline")
    jobs = [j["metadata"]["name"] for j in site.get("jobs", "-l", "gantline.io/service=chat")["items"]]
    assert {name.split("-")[1] for name in jobs} == {"inspect", "quantize"}
    assert all(site.kubectl("logs", f"job/{name}") for name in jobs)
    assert site.kubectl("logs", "deployment/chat")


def test_the_operator_is_no_admin_and_the_gateway_only_reads(site: Site) -> None:
    account = "--as=system:serviceaccount:gantline-system:gantline"
    for what in ("get secrets", "create pods --subresource=exec", "delete nodes", "create clusterroles", "create rolebindings"):
        assert site.kubectl("auth", "can-i", *what.split(), account, check=False).strip() == "no", what
    assert site.kubectl("auth", "can-i", "patch", "inferenceservices.gantline.io", "--subresource=status", account).strip() == "yes"
    for what in ("get secrets", "get pods", "patch inferenceservices.gantline.io"):
        assert site.kubectl("auth", "can-i", *what.split(), f"{account}-gateway", check=False).strip() == "no", what


def test_a_killed_runtime_comes_back(site: Site) -> None:
    def restarts() -> int:
        pods = site.get("pods", "-l", "gantline.io/service=chat,gantline.io/role=server")["items"]
        return sum(s["restartCount"] for p in pods for s in p["status"].get("containerStatuses", []))

    before = restarts()
    site.kubectl("exec", "deployment/chat", "--", "/bin/sh", "-c", "kill -9 $(pgrep -f gantline | grep -v '^1$' | head -1)", check=False)
    site.until("the container was restarted", lambda: restarts() > before)
    site.until("the service is ready again", lambda: ready(site, "chat"), 120)


@pytest.mark.parametrize(
    ("name", "uri", "spec", "kind", "reason"),
    [
        ("no-folder", "file:///opt/gantline/nothing", {}, "ModelReady", "ModelNotFound"),
        ("no-model", "file:///usr/share", {}, "ModelReady", "NotAModel"),
        ("no-heads", TINY, {"engine": {"tensorParallel": 8}}, "PlanResolved", None),
        ("no-gpu", TINY, {"accelerator": {"resource": "auto"}}, "PlanResolved", None),
        pytest.param(
            "no-quality", TINY, {"quantization": {"method": "awq", "maxPerplexityIncrease": "0.0"}, "cache": {"size": "1Gi"}},
            "QuantizationReady", "QualityGateFailed",
            marks=pytest.mark.skipif(not FULL, reason="quantizes a second time: GANTLINE_FULL_MATRIX=1"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_run_says_why_and_never_serves(
    site: Site, name: str, uri: str, spec: dict[str, Any], kind: str, reason: str | None
) -> None:
    site.apply(service(name, uri, **spec))
    found = site.until(
        f"{kind} is False for {name}",
        lambda: (c := site.condition(name, kind)).get("status") == "False" and (reason in (None, c["reason"])) and c,
        150,
    )
    assert len(found["message"]) > 10
    assert site.condition(name, "Ready")["status"] == "False"
    assert site.get("deployment", name) is None
    site.kubectl("delete", "gisvc", name)


def test_a_copy_over_a_new_limit_is_refused_while_what_serves_goes_on(site: Site) -> None:
    before = server_pods(site)
    limit: Callable[[str], str] = lambda share: json.dumps({"spec": {"quantization": {"maxPerplexityIncrease": share}}})
    site.kubectl("patch", "gisvc", "chat", "--type=merge", "-p", limit("0.0001"))
    site.until("the copy is refused", lambda: site.condition("chat", "QuantizationReady").get("reason") == "QualityGateFailed")
    assert site.condition("chat", "Servable")["status"] == "True" and not ready(site, "chat")
    site.kubectl("patch", "gisvc", "chat", "--type=merge", "-p", limit("0.05"))
    site.until("the service is ready again", lambda: ready(site, "chat"))
    assert server_pods(site) == before


def test_an_unknown_field_is_refused_with_its_name(site: Site) -> None:
    manifest = json.dumps(service("odd", modell={"uri": "x"}))
    done = site.run("kubectl", "apply", "-f", "-", stdin=manifest, check=False)
    assert done.returncode and "modell" in done.stderr


def test_an_upgrade_of_the_chart_restarts_no_serving_pod(site: Site) -> None:
    before = server_pods(site)
    values = f"operator.logLevel=debug,runtime.hfEndpoint=http://{HUB}.default.svc,gateway.apiKeys.enabled=true"
    changed = ("--reuse-values", "--set", values, "--set", "runtime.insecureRegistries={registry.default.svc}")
    site.run("helm", "upgrade", "gantline", "charts/gantline", "-n", "gantline-system", *changed, "--wait")
    site.until("the service is ready", lambda: ready(site, "chat"))
    assert server_pods(site) == before


def test_the_gateway_wants_a_key_of_a_secret_and_follows_its_rotation(site: Site) -> None:
    """As the upgrade before this asked for."""
    first, second = "gl-first-key-0123456789", "gl-second-key-0123456789"
    site.until("no gateway of before the upgrade is about", lambda: not leaving_gateways(site))
    site.until("nobody gets in without a key", lambda: status_with(site, first) == 401)
    site.apply(key_secret(f"{first} models=chat tokens-per-minute=100000"))
    site.until("the key is known", lambda: status_with(site, first) == 200)
    site.until("no other key is", lambda: status_with(site, "gl-wrong-key-0123456789") == 401)
    site.apply(key_secret(second))
    site.until("the old key is not known any more", lambda: status_with(site, first) == 401)
    site.until("the new one is", lambda: status_with(site, second) == 200)
    # Of every gateway: one that the upgrade before this replaces may still be about.
    log = site.kubectl("logs", "-n", "gantline-system", "-l", "app.kubernetes.io/component=gateway", "--tail=-1")
    assert '"api_key": "team-a/alice"' in log and first not in log and second not in log


def test_the_gateway_speaks_https_with_a_secrets_certificate_and_shows_a_renewed_one_without_a_restart(site: Site, tmp_path: Path) -> None:
    port = site.get("service", "gantline-gateway", "-n", "gantline-system")["spec"]["ports"][0]["port"]  # which is relayed to here
    change = ("upgrade", "gantline", "charts/gantline", "-n", "gantline-system", "--reuse-values", "--wait", "--set")
    site.apply(tls_secret(make_certificate(tmp_path, "first")))
    site.run("helm", *change, f"gateway.tls.secretName=gateway-tls,gateway.service.port={port}")
    url, trusted = site.url.replace("http:", "https:") + "/v1/models", tmp_path / "cert.pem"
    site.until("a gateway shows the certificate", lambda: shown(url, trusted) == "first")
    site.until("the gateways of before are gone", lambda: not leaving_gateways(site))
    before = gateway_pods(site)
    site.apply(tls_secret(make_certificate(tmp_path, "second")))
    site.until("it shows the renewed one", lambda: shown(url, trusted) == "second", seconds=240)
    assert gateway_pods(site) == before and all(restarts == 0 for _, restarts in before)
    site.run("helm", *change, "gateway.tls.secretName=")
    site.until("it answers in plain HTTP again", lambda: status_with(site, "gl-wrong-key-0123456789") == 401)


def tls_secret(certificate: Path) -> dict[str, Any]:
    data = {"tls.crt": certificate.read_text(), "tls.key": certificate.with_name("key.pem").read_text()}
    metadata = {"name": "gateway-tls", "namespace": "gantline-system"}
    return {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": metadata, "stringData": data}


def shown(url: str, trusted: Path) -> str:
    try:
        return shown_subject(url, trusted)
    except httpx.HTTPError:
        return ""


def gateway_pods(site: Site) -> set[tuple[str, int]]:
    """Name and restarts of each."""
    pods = site.get("pods", "-n", "gantline-system", "-l", "app.kubernetes.io/component=gateway")["items"]
    return {(pod["metadata"]["name"], pod["status"]["containerStatuses"][0]["restartCount"]) for pod in pods}


def leaving_gateways(site: Site) -> list[str]:
    pods = site.get("pods", "-n", "gantline-system", "-l", "app.kubernetes.io/component=gateway")["items"]
    return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" in pod["metadata"]]


def key_secret(value: str) -> dict[str, Any]:
    metadata = {"name": "team-a", "namespace": "gantline-system", "labels": {"gantline.io/api-keys": "true"}}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"alice": value}}


def status_with(site: Site, key: str) -> int:
    """Of one question with this key, asked of the address that needs none before; 0 where nobody answers."""
    client = OpenAI(base_url=f"{site.url}/v1", api_key=key, max_retries=0)
    try:
        client.completions.create(model="chat", prompt="The licence", max_tokens=1)
    except APIStatusError as error:
        return error.status_code
    except APIConnectionError:
        return 0
    return 200


def model_server(name: str, program: str, secret: dict[str, str], kind: str = "Opaque") -> dict[str, Any]:
    """A pod that offers the tiny model by one of the tests' servers, its Service, and the Secret that opens it."""
    command = ["python", "-m", *program.split(), "--port=8080"]
    security = {"runAsNonRoot": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": name, "image": RUNTIME_IMAGE, "command": command, "workingDir": f"{HOME}/source", "securityContext": security}
    container["readinessProbe"] = {"tcpSocket": {"port": 8080}, "periodSeconds": 1}
    pod = {"containers": [container], "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False}
    items = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": pod},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
         "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": secret, "type": kind},
    ]  # fmt: skip
    return {"apiVersion": "v1", "kind": "List", "items": items}


@contextmanager
def watched(site: Site, name: str, path: str) -> Iterator[list[str]]:
    """What `kubectl get -w` shows of a service meanwhile, whole after the block."""
    lines: list[str] = []
    command = ["kubectl", "get", f"gisvc/{name}", "--watch", "-o", f"jsonpath={path}{{'\\n'}}"]
    process = subprocess.Popen(command, env=site.environment, stdout=subprocess.PIPE, text=True)
    try:
        yield lines
    finally:
        process.terminate()
        lines += process.communicate()[0].splitlines()


def test_a_model_of_a_hub_is_fetched_with_its_token_into_the_cache_and_served(site: Site) -> None:
    slow = "--bytes-per-s=1500000"  # enough to be watched
    program = f"tests.runtime.hub_server examples/tiny-model --token=open-sesame {slow}"
    site.apply(model_server(HUB, program, {"HF_TOKEN": "open-sesame"}))
    site.kubectl("wait", f"pod/{HUB}", "--for=condition=Ready", "--timeout=60s")
    remote = service("remote", "hf://org/name", cache={"size": "1Gi"})
    remote["spec"]["model"]["secretRef"] = {"name": HUB}
    site.apply(remote)
    with watched(site, "remote", "{.status.stages[*].progress}") as progress:
        site.until("the service is ready", lambda: ready(site, "remote"))
    shares = [int(share) for line in progress for share in re.findall(r"^fetching (\d+)%", line)]
    assert any(0 < share < 100 for share in shares) and shares == sorted(shares), progress
    status = site.get("gisvc", "remote")["status"]
    assert status["model"]["revision"] == COMMIT, "the branch was pinned to its commit"
    assert [a["kind"] for a in status["artefacts"]] == ["fetch"]
    arguments = site.get("deployment", "remote")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[:2] == ["serve", f"/mnt/cache/fetch-{status['artefacts'][0]['hash']}"]
    site.kubectl("delete", "gisvc/remote", f"pod/{HUB}", f"service/{HUB}", f"secret/{HUB}", "--wait=false")


def test_a_model_in_an_image_is_mounted_by_the_node_with_the_services_login_and_served_without_a_copy(site: Site) -> None:
    login = json.dumps({"auths": {"registry.default.svc": {"username": USER, "password": "open-sesame"}}})
    program = "tests.runtime.registry_server examples/tiny-model --image --password=open-sesame"
    site.apply(model_server("registry", program, {".dockerconfigjson": login}, "kubernetes.io/dockerconfigjson"))
    site.kubectl("wait", "pod/registry", "--for=condition=Ready", "--timeout=60s")
    address = site.get("service", "registry")["spec"]["clusterIP"]  # the node asks no name server of the cluster's
    trust_plainly(site, "registry.default.svc", f"http://{address}:1")  # where nobody listens
    mounted = service("mounted", "oci://registry.default.svc/team/tiny:v1")
    mounted["spec"]["model"] |= {"secretRef": {"name": "registry"}, "delivery": "image"}
    site.apply(mounted)
    refused = lambda: (c := site.condition("mounted", "Ready")).get("reason") == "ImagePullFailed" and c
    message = site.until("it is said that the node cannot pull it", refused)["message"]
    assert "registry.default.svc/team/tiny@sha256:" in message and RUNTIME_IMAGE not in message, message
    trust_plainly(site, "registry.default.svc", f"http://{address}")
    site.until("the service is ready", lambda: ready(site, "mounted"))
    pod = site.get("pods", "-l", "gantline.io/service=mounted,gantline.io/role=server")["items"][0]
    digest = site.get("gisvc", "mounted")["status"]["model"]["revision"]
    images = [volume["image"]["reference"] for volume in pod["spec"]["volumes"] if "image" in volume]
    assert images == [f"registry.default.svc/team/tiny@{digest}"] and pod["spec"]["containers"][0]["args"][1] == "/mnt/image/models"
    assert not site.get("pvc", "mounted-cache") and not site.get("jobs", "-l", "gantline.io/service=mounted,gantline.io/role=fetch")
    client = OpenAI(base_url=f"{site.url}/v1", api_key=next_key(site), max_retries=0)
    site.until("the gateway knows it", lambda: "mounted" in [model.id for model in client.models.list()])
    assert client.completions.create(model="mounted", prompt="The licence", max_tokens=4).choices[0].text
    site.kubectl("delete", "gisvc/mounted", "pod/registry", "service/registry", "secret/registry", "--wait=false")


def trust_plainly(site: Site, registry: str, url: str) -> None:
    """The node pulls from `registry` at this address, over plain HTTP."""
    folder = Path(site.environment["KUBECONFIG"]).parent / "registries" / registry
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(f'server = "{url}"\n[host."{url}"]\n  capabilities = ["pull", "resolve"]\n')


def next_key(site: Site) -> str:
    """One that the gateway takes, whatever tests before have done to the others."""
    key = "gl-image-key-0123456789"
    secret = key_secret(key)
    secret["metadata"]["name"] = "team-b"
    site.apply(secret)
    site.until("the key is known", lambda: status_with(site, key) == 200)
    return key


@pytest.mark.skipif(not FULL, reason="two more services: GANTLINE_FULL_MATRIX=1")
def test_models_of_a_bucket_and_of_a_registry_are_fetched_with_their_secrets(site: Site) -> None:
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": "open/sesame", "AWS_ENDPOINT_URL": "http://store.default.svc"}
    login = {"auths": {"registry.default.svc": {"username": USER, "password": "open-sesame"}}}
    servers = {
        "store": ("tests.runtime.s3_server examples/tiny-model --secret=open/sesame --bytes-per-s=1000000", keys, "Opaque"),
        "registry": (
            "tests.runtime.registry_server examples/tiny-model --password=open-sesame",
            {".dockerconfigjson": json.dumps(login)}, "kubernetes.io/dockerconfigjson",
        ),
    }  # fmt: skip
    for name, (program, secret, kind) in servers.items():
        site.apply(model_server(name, program, secret, kind))
    site.kubectl("wait", "pod/store", "pod/registry", "--for=condition=Ready", "--timeout=60s")
    for name, uri in (("store", "s3://models/tiny"), ("registry", "oci://registry.default.svc/team/tiny:v1")):
        remote = service(f"of-{name}", uri, cache={"size": "1Gi"}, replicas=0)
        remote["spec"]["model"]["secretRef"] = {"name": name}
        site.apply(remote)
    share = lambda: re.search(r"fetching [2-9]\d%", str(site.get("gisvc", "of-store")["status"].get("stages")))
    site.until("a part is fetched", share)
    fetches = "gantline.io/service=of-store,gantline.io/role=fetch"
    site.kubectl("delete", "pod", "-l", fetches, "--force", "--grace-period=0")
    for name in ("of-store", "of-registry"):
        site.until(f"the model of {name} is there", lambda name=name: site.condition(name, "ModelReady").get("reason") == "Fetched")
        assert site.get("gisvc", name)["status"]["model"]["revision"]
    jobs = sorted(job["metadata"]["name"] for job in site.get("jobs", "-l", fetches)["items"])
    assert len(jobs) == 2 and '"resuming"' in site.kubectl("logs", f"job/{jobs[1]}"), "the second Job goes on with what the first one left"
    site.kubectl("patch", "secret", "store", "--type=merge", "-p", '{"stringData": {"AWS_SECRET_ACCESS_KEY": "wrong"}}')
    again = service("refused", "s3://models/tiny", replicas=0)
    again["spec"]["model"]["secretRef"] = {"name": "store"}
    site.apply(again)
    refused = lambda: (c := site.condition("refused", "ModelReady")).get("reason") == "DownloadUnauthorized" and c
    assert "SignatureDoesNotMatch" in site.until("wrong keys are refused", refused)["message"]
    objects = [f"{kind}/{name}" for kind in ("pod", "service", "secret") for name in servers]
    site.kubectl("delete", "gisvc/of-store", "gisvc/of-registry", "gisvc/refused", *objects, "--wait=false")


def test_helm_test_creates_asks_and_deletes_a_service(site: Site) -> None:
    site.run("helm", "test", "gantline", "-n", "gantline-system", "--timeout", "6m")
    assert [s["metadata"]["name"] for s in site.get("gisvc", "-A")["items"]] == ["chat"]


def test_a_second_quickstart_picks_up_where_things_stand(site: Site) -> None:
    before = server_pods(site)
    done = make("quickstart")
    assert done.returncode == 0, done.stdout + done.stderr
    assert server_pods(site) == before


def replaced(site: Site, rollout: dict[str, Any]) -> None:
    """Has all pods of the service replaced as `rollout` says, and returns once their successors serve alone."""
    before = server_pods(site)
    restarted = {"metadata": {"annotations": {"gantline.io/restartedAt": str(time.monotonic_ns())}}, "spec": {"rollout": rollout}}
    site.kubectl("patch", "gisvc/chat", "--type=merge", "-p", json.dumps(restarted))
    site.until("no old pod is left", lambda: not before.keys() & server_pods(site).keys(), 240)
    site.until("the service is ready again", lambda: ready(site, "chat"))


def test_streams_through_the_gateway_finish_while_their_service_is_replaced(site: Site) -> None:
    """Without a place for a second pod they wait in between; with one they need not."""
    for _ in range(5 if FULL else 1):
        for strategy in ("Drain", "Surge"):
            with Streams(site.url, 32 if FULL else 4, tokens=24, pause_s=0.0 if FULL else 0.5) as streams:
                replaced(site, {"strategy": strategy, "drainTimeout": "60s"})
            longest = max(stream.first_text_s for stream in streams.ended)
            print(f"{strategy}: {len(streams.ended)} streams, longest wait for the first text {longest:.1f} s")
            assert {stream.how for stream in streams.ended} == {"length"}, (strategy, streams.ended)
            assert longest > 2.0 or strategy == "Surge", "between the old pod and the new one requests were held"


@pytest.mark.skipif(not FULL, reason="two more rollouts: GANTLINE_FULL_MATRIX=1; the server's own tests have the same of one process")
def test_a_stream_that_outlasts_the_drain_time_ends_with_an_error_and_no_other_does(site: Site) -> None:
    replaced(site, {"strategy": "Surge", "drainTimeout": "3s"})
    with Streams(site.url, 3, tokens=1900) as long, Streams(site.url, 2, tokens=8) as short:
        replaced(site, {"strategy": "Surge", "drainTimeout": "60s"})
    assert {stream.how for stream in short.ended} == {"length"}, short.ended
    assert {stream.how for stream in long.ended} == {"length", "error: shutting_down"}, long.ended


def test_nothing_outside_the_cluster_was_asked_for(site: Site) -> None:
    """Of all that came before: installing, inspecting, fetching, quantizing, serving. One pod asks now, so that silence is not deafness."""
    ask = "import socket; socket.socket().connect_ex(('192.0.2.1', 443)); socket.getaddrinfo('outside.example', 443)"
    site.kubectl("exec", "deployment/chat", "--", "python", "-c", ask, check=False)
    outside = [sys.executable, "-m", "gantline_devcluster", "outside", "--json"]
    found = json.loads(site.run(*outside, check=False).stdout)
    assert found == {"addresses": ["192.0.2.1:443"], "names": ["outside.example"]}


def test_delete_leaves_nothing(site: Site) -> None:
    site.apply(service("brief", suspend=True))
    site.kubectl("delete", "gisvc", "chat", "brief")
    ours = "app.kubernetes.io/managed-by=gantline-operator"
    kinds = "deployments,jobs,pods,services,serviceaccounts,pvc,pdb,controllerrevisions"
    site.until("no child is left", lambda: not site.kubectl("get", kinds, "-l", ours, "-o", "name").strip())


def test_uninstall_keeps_the_resource_definition_and_another_release_takes_it(site: Site) -> None:
    values = site.run("helm", "get", "values", "gantline", "-n", "gantline-system", "-o", "json").stdout
    site.run("helm", "uninstall", "gantline", "-n", "gantline-system", "--wait")
    assert site.get("crd", "inferenceservices.gantline.io")
    site.run("helm", "install", "other", "charts/gantline", "-n", "other", "--create-namespace", "--values", "-", "--wait", stdin=values)
    site.run("helm", "uninstall", "other", "-n", "other", "--wait")


def test_down_leaves_nothing_behind(site: Site) -> None:
    home = str(Path(site.environment["KUBECONFIG"]).parent)
    server = re.search(r"https://127\.0\.0\.1:(\d+)", Path(site.environment["KUBECONFIG"]).read_text())
    assert server and make("down").returncode == 0
    listening = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True).stdout
    assert not re.search(rf"127\.0\.0\.1:({server[1]}|{site.url.rsplit(':', 1)[1]})\s", listening), listening
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert home not in processes
    assert home not in Path("/proc/mounts").read_text() and not Path(home).exists()
