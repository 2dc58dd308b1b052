"""API keys of the gateway: how they are written down, what they may, and that they never show."""

from __future__ import annotations

import base64
import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
from gantline_gateway.key_secrets import collect_keys
from gantline_gateway.keys import ApiKey, KeyRing, keys_of_entry, keys_of_file
from gantline_runtime.errors import ConfigurationError

ALICE, BOB = "gl-alices-key-0123456789", "gl-bobs-key-0123456789"


def hashed(key: str, options: str = "") -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {options}".strip()


def secret(name: str, **entries: str) -> dict[str, Any]:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in entries.items()}
    return {"metadata": {"name": name}, "data": data}


def test_a_line_says_what_a_key_may(tmp_path: Path) -> None:
    options = "models=chat,team-a/code,team-b/* tokens-per-minute=1000 concurrency=3 weight=2 priority=-5"
    (tmp_path / "keys").write_text(f"# whose\nalice {hashed(ALICE, options)}\nbob {hashed(BOB)}\n")
    ring = keys_of_file(tmp_path / "keys")
    models = ("chat", "team-a/code", "team-b/*")
    assert ring.find(ALICE) == ApiKey("alice", models, tokens_per_minute=1000, concurrency=3, weight=2.0, priority=-5)
    assert ring.find(BOB) == ApiKey("bob", priority=0)
    assert ring.find(ALICE[:-1]) is None and ring.find("") is None and ring.find(hashed(ALICE)) is None


@pytest.mark.parametrize(
    ("namespace", "name", "model", "may"),
    [
        ("default", "any", "chat", True),
        ("default", "chat", "other", False),
        ("team-a", "code", "any", True),
        ("team-a", "other", "code", False),
        ("default", "code", "code", False),
        ("team-b", "any", "anything", True),
        ("team-bb", "any", "anything", False),
        ("default", "*", "*", False),
    ],
)
def test_models_are_named_alone_or_services_with_their_namespace(namespace: str, name: str, model: str, may: bool) -> None:
    assert ApiKey("alice", ("chat", "team-a/code", "team-b/*")).may_use(namespace, name, model) is may
    assert ApiKey("bob").may_use(namespace, name, model) and not ApiKey("none", ()).may_use(namespace, name, model)


def test_an_entry_of_a_secret_holds_keys_or_hashes_and_both_while_one_replaces_the_other() -> None:
    text = f"{ALICE} concurrency=2\n# the old one\n{hashed(BOB, 'concurrency=2')}\n"
    ring = KeyRing.of(keys_of_entry("team-a", "alice", text))
    assert ring.find(ALICE) == ring.find(BOB) == ApiKey("team-a/alice", concurrency=2, priority=0)


@pytest.mark.parametrize(
    "options",
    [
        "models=", "models=a,,b", "models=*", "models=a/b/*", "models=A/*", "tokens-per-minute=0", "tokens-per-minute=1e3",
        "concurrency=-1", "concurrency=9999999", "limit=3", "models", "concurrency=1 concurrency=2", ALICE,
    ],
)  # fmt: skip
def test_an_option_that_is_unknown_or_illegal_is_refused_with_what_is_allowed(options: str) -> None:
    with pytest.raises(ConfigurationError, match="tokens-per-minute= ") as refused:
        keys_of_entry("team-a", "alice", hashed(BOB, options))
    assert ALICE not in str(refused.value) and "'alice'" in str(refused.value)


def test_what_cannot_be_read_of_secrets_hides_nothing_else_and_is_named_without_its_value(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gantline.gateway")
    binary = {"metadata": {"name": "c"}, "data": {"binary": "gA==", "no-base64": "?"}}
    ring = collect_keys([secret("b", bob=BOB), binary, secret("a", short="abc", alice=ALICE, odd=f"{BOB}x other=1"), secret("empty")])
    assert [getattr(ring.find(key), "name", None) for key in (ALICE, BOB, f"{BOB}x")] == ["a/alice", "b/bob", None]
    told = [vars(record)["fields"] for record in caplog.records]
    assert [line["secret"] for line in told] == ["a", "a", "c", "c"]
    assert "3 characters" in told[1]["cause"] and "is no text" in told[2]["cause"]
    assert not any(key in str(told) for key in (ALICE, BOB))


def test_one_key_in_two_secrets_is_the_first_ones_on_every_replica() -> None:
    first, second = secret("a", x=ALICE), secret("b", x=f"{ALICE} models=chat")
    one, other = collect_keys([first, second]), collect_keys([second, first])
    assert one.find(ALICE) == other.find(ALICE) == ApiKey("a/x", priority=0)
