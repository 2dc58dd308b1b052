"""API keys, through the port: who gets in, which models they see, how much they may use, and what is told of them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gantline_gateway.access import Access, KeyCheck
from gantline_gateway.key_sources import FileKeys
from gantline_runtime.server.reloading import Reloader
from starlette.types import Receive, Scope, Send

from tests.gateway.gateway_process import GatewayProcess, gateway, write_services
from tests.runtime.server_process import ServerProcess, wait_until

ALICE, BOB, CAROL, DAVE = (f"gl-{name}s-key-0123456789" for name in ("alice", "bob", "carol", "dave"))
CHAT: dict[str, Any] = {"model": "echo", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 20}


def line(name: str, key: str, options: str = "") -> str:
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()} {options}\n"


KEYS = (
    line("alice", ALICE)
    + line("bob", BOB, "models=echo,default/slow")
    + line("carol", CAROL, "tokens-per-minute=100")
    + line("dave", DAVE, "concurrency=1")
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(KEYS)
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, keys: Path, echo: ServerProcess, slow: ServerProcess) -> Iterator[GatewayProcess]:
    offered = [
        {"name": "echo", "replicas": [echo.url]},
        {"name": "slow", "replicas": [slow.url]},
        {"name": "hidden", "namespace": "private", "servedName": "echo-hidden", "replicas": [echo.url]},
    ]
    services = write_services(tmp_path_factory.mktemp("guarded") / "services.json", *offered)
    with gateway(services, f"--api-keys={keys}") as process:
        yield process


def ask(process: GatewayProcess, key: str, **fields: Any) -> httpx.Response:
    return process.post("/v1/chat/completions", {**CHAT, **fields}, headers={"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": "Bearer"}, "missing_api_key"),
        ({"Authorization": f"Basic {ALICE}"}, "missing_api_key"),
        ({"Authorization": f"Bearer {ALICE}x"}, "invalid_api_key"),
        ({"Authorization": "Bearer " + "x" * 10_000}, "invalid_api_key"),
    ],
)
def test_without_a_key_that_is_known_nothing_is_answered(guarded: GatewayProcess, header: dict[str, str], code: str) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/other"):
        answer = guarded.post(path, CHAT, headers=header)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
        assert answer.headers["www-authenticate"] == "Bearer"


def test_without_keys_the_log_warns_and_anyone_may_ask(shared: GatewayProcess) -> None:
    assert shared.wait_log("no API key is needed: whoever reaches this port may ask")["level"] == "warning"
    assert ask(shared, "none").status_code == 200


def test_with_a_key_an_unchanged_client_works_and_the_log_has_its_name_alone(guarded: GatewayProcess) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=ALICE, max_retries=0)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "Hello there"
    wait_until(lambda: any(entry.get("api_key") == "alice" for entry in guarded.logs), what="the log line")
    assert not [entry for entry in guarded.logs if ALICE in str(entry)]


@pytest.mark.parametrize("needed", [True, False])
async def test_a_key_of_the_gateways_goes_no_further_and_others_are_left_to_the_replicas(keys: Path, needed: bool) -> None:
    passed_on: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed_on.extend(scope["headers"])

    headers = [(b"authorization", f"Bearer {ALICE}".encode()), (b"x-other", b"1")]
    check = KeyCheck(app, Access(FileKeys(keys, Reloader()) if needed else None))
    await check({"type": "http", "headers": headers, "state": {}}, _nothing, _nothing)
    assert passed_on == (headers[1:] if needed else headers)


async def _nothing(*_: Any) -> Any:
    return None


def test_a_key_sees_and_uses_the_models_that_it_may(guarded: GatewayProcess) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=BOB, max_retries=0)
    assert [model.id for model in client.models.list()] == ["echo", "slow"]
    assert ask(guarded, BOB, model="default/echo").status_code == 200
    for model in ("echo-hidden", "private/hidden"):
        refused = ask(guarded, BOB, model=model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
        with pytest.raises(openai.PermissionDeniedError):
            client.models.retrieve(model)
    assert ask(guarded, BOB, model="nothing").status_code == 404


def test_tokens_a_minute_are_charged_by_what_was_used_and_the_refusal_says_when_to_come_again(guarded: GatewayProcess) -> None:
    answers = [ask(guarded, CAROL) for _ in range(2)]
    used = sum(answer.json()["usage"]["total_tokens"] for answer in answers)
    refused = ask(guarded, CAROL, max_tokens=95)
    assert [answer.status_code for answer in (*answers, refused)] == [200, 200, 429] and used < 90
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert 1 <= int(refused.headers["retry-after"]) <= 60 * used / 100 + 10
    assert ask(guarded, CAROL, max_tokens=1).status_code == 200, "a smaller one fits"
    series = guarded.internal("/metrics").text
    assert 'gantline_gateway_key_limited_total{key="carol",limit="tokens"} 1.0' in series
    assert f'gantline_gateway_key_requests_total{{key="carol"}} {len(answers) + 1}' in series
    assert 'gantline_gateway_key_completion_tokens_total{key="carol"}' in series and CAROL not in series


def test_requests_at_once_are_limited_until_one_ends_or_its_client_leaves(guarded: GatewayProcess) -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {DAVE}"}, timeout=30))
        body = {**CHAT, "model": "slow", "stream": True, "max_tokens": 4000}
        stream = stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
        assert stream.status_code == 200
        refused = ask(guarded, DAVE)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "1 requests at once" in refused.json()["error"]["message"]
    wait_until(lambda: ask(guarded, DAVE).status_code == 200, what="the place is free again")


def test_a_changed_file_is_read_again_and_a_broken_one_changes_nothing(guarded: GatewayProcess, keys: Path) -> None:
    rotated = ALICE[::-1]
    keys.write_text(KEYS.replace(line("alice", ALICE), line("alice", rotated)))
    wait_until(lambda: ask(guarded, rotated).status_code == 200, what="the new key is known")
    assert ask(guarded, ALICE).status_code == 401
    keys.write_text(f"alice {ALICE}\n")
    cause = guarded.wait_log("a changed file cannot be used; the old content stays in use")["cause"]
    assert ask(guarded, rotated).status_code == 200 and "line 1: after the name, sha256:" in cause and ALICE not in cause
