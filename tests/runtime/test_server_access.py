"""API keys, TLS and CORS, through the port."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from gantline_runtime.config import ServerConfig
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.access import OPEN_PATHS
from gantline_runtime.server.api_keys import ApiKeys
from gantline_runtime.server.callers import Caller, read_caller
from gantline_runtime.server.routes import ROUTES
from gantline_runtime.server.tls import Certificate

from tests.runtime.certificate_files import make_certificate, shown_subject
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ROOT, ServerProcess, running, wait_until

FAST = ("--drain-delay=0", "--drain-timeout=0")
ALICE, BOB = "gl-alices-key-0123456789", "gl-bobs-key-0123456789"


def _line(name: str, key: str, options: str = "") -> str:
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()} {options}\n"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("# who may ask\n\n" + _line("alice", ALICE, "weight=2 priority=-5"))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, keys_file: Path) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("access") / "m")
    with running(model, *FAST, f"--api-keys={keys_file}", "--cors-origins=https://app.example, http://localhost:3000") as server:
        yield server


def _ask(server: ServerProcess, key: str | None, **fields: object) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return server.post("/v1/completions", {"prompt": "hello", **fields}, headers=headers)


def test_with_the_key_an_unchanged_client_works_and_the_log_has_its_name(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0)
    assert client.completions.create(model="m", prompt="hello").choices[0].text == "hello"
    line = server.wait_log("request")
    assert line["api_key"] == "alice"
    assert ALICE not in "\n".join(server.lines) and "hello" not in "\n".join(server.lines)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Basic " + ALICE, "missing_api_key"),
        ("Bearer " + ALICE[:-1], "invalid_api_key"),
        ("Bearer " + ALICE + "x", "invalid_api_key"),
        ("Bearer " + "x" * 100_00, "invalid_api_key"),
        ("Bearer " + hashlib.sha256(ALICE.encode()).hexdigest(), "invalid_api_key"),
    ],
)
def test_without_the_key_nothing_is_answered(server: ServerProcess, header: str | None, code: str) -> None:
    response = server.post("/v1/completions", {"prompt": "a"}, headers={} if header is None else {"Authorization": header})
    assert response.status_code == 401 and response.json()["error"]["code"] == code
    assert response.headers["www-authenticate"] == "Bearer" and response.headers["x-request-id"]


def test_every_endpoint_asks_for_the_key_but_those_of_probes_and_documents(server: ServerProcess) -> None:
    for endpoint in ROUTES:
        status = server.send(endpoint.method, endpoint.path.replace("{model:path}", "m")).status_code
        assert (status == 401) == (endpoint.path not in OPEN_PATHS), endpoint.path
    assert {endpoint.path for endpoint in ROUTES} >= OPEN_PATHS
    assert server.get("/nothing").status_code == 401


def test_a_key_bounds_the_priority_of_its_requests(server: ServerProcess) -> None:
    assert _ask(server, ALICE, priority=-5).status_code == 200
    refused = _ask(server, ALICE, priority=-6)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority" and "-5" in refused.json()["error"]["message"]


def test_keys_are_reloaded_and_a_broken_file_changes_nothing(server: ServerProcess, keys_file: Path) -> None:
    assert _ask(server, BOB).status_code == 401
    before = keys_file.read_text()
    keys_file.write_text(before + _line("bob", BOB))
    wait_until(lambda: _ask(server, BOB).status_code == 200, 10, "the new key is known")
    keys_file.write_text("bob sha256:1234\n")
    server.wait_log("a changed file cannot be used; the old content stays in use")
    assert _ask(server, ALICE).status_code == 200 == _ask(server, BOB).status_code
    keys_file.write_text(before)
    wait_until(lambda: _ask(server, BOB).status_code == 401, 10, "the old key is gone")


def test_pages_of_allowed_origins_may_ask_and_read_errors_too(server: ServerProcess) -> None:
    origin = {"Origin": "https://app.example"}
    sent = "authorization,content-type,openai-project,x-stainless-lang,x-stainless-retry-count"  # as OpenAI's client for browsers does
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": sent}
    preflight = server.send("OPTIONS", "/v1/completions", headers={**origin, **asked})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://app.example"
    refused = server.post("/v1/completions", {"prompt": "a"}, headers=origin)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"
    other = server.send("OPTIONS", "/v1/completions", headers={"Origin": "https://evil.example", **asked})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_a_flood_with_one_key_does_not_keep_another_waiting(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(_line("alice", ALICE) + _line("bob", BOB))
    model = write_model(tmp_path / "m", step_seconds=0.02)
    order: list[str] = []

    def ask(server: ServerProcess, name: str, key: str) -> None:
        with httpx.Client(timeout=60, headers={"Authorization": f"Bearer {key}"}) as client:
            body = {"prompt": "a", "max_tokens": 10, "ignore_eos": True}
            assert client.post(server.url + "/v1/completions", json=body).status_code == 200
        order.append(name)

    flags = [*FAST, f"--api-keys={tmp_path / 'keys'}", "--max-batch-size=1"]
    with running(model, *flags) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        flood = [pool.submit(ask, server, "alice", ALICE) for _ in range(12)]
        wait_until(lambda: server.metric("gantline_num_requests_waiting") >= 6, what="the flood waits")
        other = pool.submit(ask, server, "bob", BOB)
        for future in (*flood, other):
            future.result(60)
    assert order.index("bob") < 9, order


# ---- the file of keys


def test_a_mounted_secret_gives_a_key_a_file_and_follows_its_links(tmp_path: Path) -> None:
    """As the kubelet writes it: files are links into ..data, which is a link to a folder that changes."""
    for version, key in (("1", ALICE), ("2", BOB)):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "alice").write_text(f"{key}\n")
        (tmp_path / f"..{version}" / "hashed").write_text(_line("", key + "hashed", "weight=3").strip())
    (tmp_path / "..data").symlink_to("..1")
    for name in ("alice", "hashed"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    keys = ApiKeys(tmp_path)
    caller = keys.find(ALICE + "hashed")
    assert caller is not None and (caller.name, caller.weight) == ("hashed", 3.0)
    assert keys.find(BOB) is None and getattr(keys.find(ALICE), "name", None) == "alice"
    (tmp_path / "..new").symlink_to("..2")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    keys.reload()
    assert keys.find(ALICE) is None and getattr(keys.find(BOB), "name", None) == "alice"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no API key"),
        ("# nothing\n", "no API key"),
        (f"alice {ALICE}\n", "line 1: after the name, sha256:"),
        ("alice\n", "line 1"),
        (f"{'x' * 65} sha256:{'0' * 64}\n", "not 1 to 64"),
        (f"a b sha256:{'0' * 64}\n", "line 1"),
        (f"a sha256:{'0' * 63}\n", "64 hexadecimal"),
        (f"a sha256:{'0' * 64} weight=0\n", "weight="),
        (f"a sha256:{'0' * 64} weight=inf\n", "weight="),
        (f"a sha256:{'0' * 64} priority=-11\n", "priority="),
        (f"a sha256:{'0' * 64} admin\n", "weight="),
        (f"a sha256:{'0' * 64}\nb sha256:{'0' * 64}\n", "twice"),
        ("a" * (1 << 20) + "b", "bytes"),
    ],
)
def test_a_file_of_keys_that_says_something_else_is_refused_without_showing_it(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigurationError, match=cause) as refused:
        ApiKeys(tmp_path / "keys")
    assert ALICE not in str(refused.value)


def test_a_server_does_not_start_without_the_keys_it_was_promised(tmp_path: Path) -> None:
    server = ServerProcess(write_model(tmp_path / "m"), f"--api-keys={tmp_path / 'missing'}")
    assert server.wait_exit() == 64
    assert server.termination["reason"] == "InvalidConfiguration" and "No such file" in server.termination["message"]


def test_the_command_makes_a_key_that_the_file_knows(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    command = [sys.executable, "-m", "gantline_runtime.cli", "api-key", "carol", "--append", str(path)]
    key = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    assert len(key) > 40 and key not in path.read_text() and path.stat().st_mode & 0o077 == 0
    caller = ApiKeys(path).find(key)
    assert caller is not None and (caller.name, caller.weight, caller.best_priority) == ("carol", 1.0, 0)


@pytest.mark.parametrize("origins", ["example.org", "https://*.org", "https://a.org/path", "ftp://a.org"])
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(ConfigurationError, match="cors_origins"):
        ServerConfig(cors_origins=origins)


# ---- TLS


def test_tls_serves_and_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    make_certificate(tmp_path, "first")
    flags = [f"--tls-cert={tmp_path / 'cert.pem'}", f"--tls-key={tmp_path / 'key.pem'}"]
    with running(write_model(tmp_path / "m"), *FAST, *flags) as server:
        assert server.url.startswith("https://") and shown_subject(server.url + "/ready", tmp_path / "cert.pem") == "first"
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/ready")
        renewed = tmp_path / "renewed"
        renewed.mkdir()
        make_certificate(renewed, "second")
        os.replace(renewed / "key.pem", tmp_path / "key.pem")
        server.wait_log("a changed file cannot be used; the old content stays in use")  # half a pair
        os.replace(renewed / "cert.pem", tmp_path / "cert.pem")
        deadline = time.monotonic() + 15
        while True:
            try:
                assert shown_subject(server.url + "/ready", tmp_path / "cert.pem") == "second"
                break
            except (httpx.HTTPError, AssertionError):
                assert time.monotonic() < deadline, "the renewed certificate is not used"
                time.sleep(0.2)


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    make_certificate(tmp_path, "x")
    (tmp_path / "broken.pem").write_text("nothing")
    for cert, key in (("broken.pem", "key.pem"), ("cert.pem", "missing.pem")):
        with pytest.raises(ConfigurationError, match="cannot be used"):
            Certificate(tmp_path / cert, tmp_path / key)
    with pytest.raises(ConfigurationError, match="tls_key"):
        ServerConfig(tls_cert="cert.pem")


def test_the_openapi_document_says_where_a_key_is_wanted(server: ServerProcess) -> None:
    document = server.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for endpoint in ROUTES:
        operation = document["paths"][endpoint.name][endpoint.method.lower()]
        assert (operation.get("security") == [{"key": []}, {}]) == (endpoint.path not in OPEN_PATHS) == ("401" in operation["responses"])


# ---- a gateway's word


@pytest.mark.parametrize(
    "caller", [Caller("team-a/alice", 2.5, -3), Caller("x" * 320, 9999.9999, 10), Caller("a", 0.0001), Caller(), Caller("a.b_c-d", 1.0, 0)]
)
def test_what_a_gateway_says_of_a_caller_is_read_as_it_was_meant(caller: Caller) -> None:
    assert read_caller(caller.to_header()) == caller


@pytest.mark.parametrize(
    "header",
    ["", "alice", "a;weight=0;priority=0", "a;weight=1;priority=-11", "a b;weight=1;priority=0", "x" * 321 + ";weight=1;priority=0", "é"],
)
def test_anything_else_says_nothing(header: str) -> None:
    assert read_caller(header) is None


def test_only_a_server_that_trusts_its_gateway_believes_who_asks(tmp_path: Path, server: ServerProcess) -> None:
    told = {"X-Gantline-Caller": "team-a/alice;weight=1.0;priority=0"}
    body = {"prompt": "x", "max_tokens": 1, "priority": -1}
    with running(write_model(tmp_path / "m"), *FAST, "--trust-gateway") as trusting:
        refused = trusting.post("/v1/completions", body, headers=told)
        assert refused.status_code == 400 and "this API key allows 0 and more" in refused.json()["error"]["message"]
        assert trusting.post("/v1/completions", body).status_code == 200
        wait_until(lambda: [line["api_key"] for line in trusting.logs if "api_key" in line] == ["team-a/alice"], what="the log line")
    answer = server.post("/v1/completions", body, headers={**told, "Authorization": f"Bearer {ALICE}"})
    assert answer.status_code == 200, "what alice's own key allows"
