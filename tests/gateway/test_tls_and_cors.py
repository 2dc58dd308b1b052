"""HTTPS at the gateway's public port, with a certificate that is renewed while it runs, and pages of other origins that may ask."""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.gateway_process import GatewayProcess, gateway, write_services
from tests.runtime.certificate_files import make_certificate, shown_subject
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, events, running, wait_until

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
KEY = "gl-alices-key-0123456789"
ORIGIN, OTHER = "https://app.example", "https://evil.example"


class MountedSecret:
    """A Secret of type kubernetes.io/tls as the kubelet mounts it: files are links into ..data, a link to a folder that is replaced."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._versions = 0
        self.renew(name)
        for file in ("tls.crt", "tls.key"):
            (path / file).symlink_to(f"..data/{file}")

    def renew(self, name: str) -> Path:
        """The certificate that is now mounted, of this subject."""
        self._versions += 1
        folder = self.path / f"..version-{self._versions}"
        folder.mkdir(parents=True)
        certificate = make_certificate(folder, name, cert="tls.crt", key="tls.key")
        (self.path / "..new").symlink_to(folder.name)
        os.replace(self.path / "..new", self.path / "..data")
        return certificate

    @property
    def flags(self) -> tuple[str, str]:
        return f"--tls-cert={self.path / 'tls.crt'}", f"--tls-key={self.path / 'tls.key'}"


@pytest.fixture
def offered(tmp_path: Path, echo: ServerProcess, slow: ServerProcess) -> Path:
    replicas = [{"name": "echo", "replicas": [echo.url]}, {"name": "slow", "replicas": [slow.url]}]
    return write_services(tmp_path / "services.json", *replicas)


def test_https_answers_and_probes_metrics_and_demand_stay_as_they_are(tmp_path: Path, offered: Path) -> None:
    secret = MountedSecret(tmp_path / "tls", "first")
    with gateway(offered, *secret.flags) as process:
        trusted = ssl.create_default_context(cafile=str(secret.path / "tls.crt"))
        with httpx.Client(verify=trusted, timeout=60) as client:
            answer = client.post(f"{process.url}/v1/chat/completions", json={**CHAT, "model": "echo"})
            assert answer.json()["choices"][0]["message"]["content"] == "Hello"
        assert process.url.startswith("https://") and process.internal_url.startswith("http://")
        assert process.internal("/healthz").status_code == 200 == process.internal("/readyz").status_code
        assert "gantline_gateway_requests_total" in process.internal("/metrics").text
        assert process.demand("default/echo")["held"] == 0
        with pytest.raises(httpx.HTTPError):
            httpx.get(process.url.replace("https", "http") + "/v1/models")


@pytest.mark.parametrize(("version", "is_taken"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
def test_no_client_gets_less_than_tls_1_2(tmp_path: Path, offered: Path, version: str, is_taken: bool) -> None:
    secret = MountedSecret(tmp_path / "tls", "first")
    context = ssl.create_default_context(cafile=str(secret.path / "tls.crt"))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or the client would refuse old versions by itself
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with gateway(offered, *secret.flags) as process, httpx.Client(verify=context, timeout=60) as client:
        if is_taken:
            assert client.get(process.url + "/v1/models").status_code == 200
        else:
            with pytest.raises(httpx.ConnectError):
                client.get(process.url + "/v1/models")


def test_a_renewed_certificate_is_shown_to_new_connections_and_cuts_no_stream(tmp_path: Path, offered: Path) -> None:
    secret = MountedSecret(tmp_path / "tls", "first")
    first = ssl.create_default_context(cafile=str(secret.path / "tls.crt"))
    body = {**CHAT, "model": "slow", "stream": True, "max_tokens": 150}
    with gateway(offered, *secret.flags) as process, httpx.Client(verify=first, timeout=60) as client:
        with client.stream("POST", f"{process.url}/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            begin = next(lines)
            renewed = secret.renew("second")
            process.wait_log("a changed file was loaded")
            assert shown_subject(process.url + "/v1/models", renewed) == "second"
            with pytest.raises(httpx.ConnectError), httpx.Client(verify=first) as newcomer:
                newcomer.get(process.url + "/v1/models")
            assert process.demand("default/slow")["running"] == 1, "the stream was over before the certificate was renewed"
            text = "\n".join([begin, *lines])
        assert text.rstrip().endswith("data: [DONE]") and events(text)[-1]["choices"][0]["finish_reason"] == "length"


def test_a_certificate_that_cannot_be_used_leaves_the_old_one_in_use(tmp_path: Path, offered: Path) -> None:
    secret = MountedSecret(tmp_path / "tls", "first")
    certificate = (secret.path / "tls.crt").read_text()
    (tmp_path / "first.pem").write_text(certificate)
    with gateway(offered, *secret.flags) as process:
        (secret.path / "tls.crt").resolve().write_text("no certificate")
        line = process.wait_log("a changed file cannot be used; the old content stays in use")
        assert "cannot be used" in line["cause"]
        assert shown_subject(process.url + "/v1/models", tmp_path / "first.pem") == "first"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tls-cert=cert.pem"], "TLS needs a certificate and its key"),
        (["--tls-cert=missing.pem", "--tls-key=missing.pem"], "the certificate missing.pem and key missing.pem cannot be used"),
        (["--cors-origins=app.example"], "expected origins such as https://example.org, or *"),
    ],
)
def test_what_cannot_be_used_ends_the_process_with_a_cause(offered: Path, flags: list[str], said: str) -> None:
    process = GatewayProcess(f"--services={offered}", *flags)
    try:
        assert process.wait_exit() == 64 and said in "\n".join(process.lines)
    finally:
        process.stop()


# ---- pages of other origins


@pytest.fixture(scope="module")
def open_to_a_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """Wants a key, and lets pages of one origin ask; its replica would let pages of all."""
    folder = tmp_path_factory.mktemp("cors")
    (folder / "keys").write_text(f"alice sha256:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    with running(write_model(folder / "echo"), "--cors-origins=*", "--drain-timeout=0") as replica:
        services = write_services(folder / "services.json", {"name": "echo", "replicas": [replica.url]})
        with gateway(services, f"--api-keys={folder / 'keys'}", f"--cors-origins={ORIGIN}, http://localhost:3000") as process:
            yield process


def ask(process: GatewayProcess, origin: str, key: str | None = KEY) -> httpx.Response:
    headers = {"Origin": origin} if key is None else {"Origin": origin, "Authorization": f"Bearer {key}"}
    return process.post("/v1/chat/completions", {**CHAT, "model": "echo"}, headers=headers)


def preflight(process: GatewayProcess, origin: str) -> httpx.Response:
    """As a browser sends it for OpenAI's client: without the key, which it asks leave for."""
    names = "authorization,content-type,x-session-id,openai-organization,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    return process.send("OPTIONS", "/v1/chat/completions", headers={"Origin": origin, **asked})


def test_preflights_are_answered_without_a_key_and_for_allowed_origins_alone(open_to_a_page: GatewayProcess) -> None:
    allowed = preflight(open_to_a_page, ORIGIN)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-timeout" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    assert preflight(open_to_a_page, "http://localhost:3000").status_code == 200
    refused = preflight(open_to_a_page, OTHER)
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers


def test_answers_and_errors_can_be_read_by_that_page_and_by_no_other_whatever_the_replica_says(open_to_a_page: GatewayProcess) -> None:
    answer = ask(open_to_a_page, ORIGIN)
    assert answer.status_code == 200 and answer.headers.get_list("access-control-allow-origin") == [ORIGIN]
    assert "Origin" in answer.headers["vary"] and "Retry-After" in answer.headers["access-control-expose-headers"]
    refused = ask(open_to_a_page, ORIGIN, key=None)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in ask(open_to_a_page, OTHER).headers
    assert open_to_a_page.send("OPTIONS", "/v1/models").status_code == 401, "no preflight, so no way around the key"


def test_without_the_setting_no_page_may_ask(shared: GatewayProcess) -> None:
    assert preflight(shared, ORIGIN).status_code == 405
    assert "access-control-allow-origin" not in ask(shared, ORIGIN, key=None).headers


def test_a_stream_keeps_coming_to_a_page(open_to_a_page: GatewayProcess) -> None:
    body = {**CHAT, "model": "echo", "stream": True}
    headers = {"Origin": ORIGIN, "Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{open_to_a_page.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as stream:
        assert stream.headers["access-control-allow-origin"] == ORIGIN
        assert stream.read().decode().rstrip().endswith("data: [DONE]")
    wait_until(lambda: open_to_a_page.demand("default/echo")["running"] == 0, what="the request to end")
