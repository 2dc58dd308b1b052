"""Model URIs, and a hub read by range requests."""

from __future__ import annotations

import httpx
import pytest
from gantline_runtime.checkpoint import read_checkpoint
from gantline_runtime.errors import CheckpointError, ConfigurationError, SourceError
from gantline_runtime.sources import parse_uri, patience
from gantline_runtime.sources.hub import HubFiles, hub_service
from gantline_runtime.termination import Reason

from tests.runtime.checkpoint_files import model_files
from tests.runtime.hub_server import COMMIT, Hub, serve_hub

TOKEN = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize(
    ("text", "path", "repository"),
    [
        ("/models/tiny", "/models/tiny", ""),
        ("examples/tiny-model", "examples/tiny-model", ""),
        ("file:///models/with%20blank", "/models/with blank", ""),
        ("file://localhost/models", "/models", ""),
        ("hf://org/name", None, "org/name"),
        ("hf://Qwen/Qwen3-0.6B/", None, "Qwen/Qwen3-0.6B"),
        ("hf://gpt2", None, "gpt2"),
    ],
)
def test_a_uri_is_a_folder_or_a_repository(text: str, path: str | None, repository: str) -> None:
    uri = parse_uri(text)
    assert (None if uri.path is None else str(uri.path), uri.repository) == (path, repository)


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://a/b/c",
        "hf://../etc",
        "hf://org/..",
        "hf://org/na me",
        "hf://org/name?x=1",
        "file://host/x",
        "s3://",
        "s3://Bucket/x",
        "s3://bucket/../x",
        "s3://bucket/.git",
        "s3://bucket/a b",
        "s3://key:secret@bucket/x",
        "oci://registry.example",
        "oci://registry.example/Name",
        "oci://registry.example/name@sha256:beef",
        "oci://user@registry.example/name",
        "oci://registry.example/a/../b",
        "pvc://claim/x",
        "http://x/y",
    ],
)
def test_any_other_uri_is_refused_with_what_to_give(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_uri(text)
    assert "Give" in caught.value.cure


@pytest.mark.parametrize("revision", ["../x", "a b", "-x", "x" * 300, "a\nb"])
def test_a_revision_that_is_none_is_refused(revision: str) -> None:
    with pytest.raises(ConfigurationError):
        HubFiles("org/name", revision)


def open_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, revision: str = "", timeout_s: float = 5.0) -> HubFiles:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    return HubFiles("org/name", revision, timeout_s=timeout_s)


def test_a_hubs_checkpoint_is_judged_by_its_headers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    big = model_files({"vocab_size": 60_000})
    with serve_hub(Hub(files=big)) as hub:
        checkpoint = read_checkpoint(open_hub(hub, monkeypatch), name="org/name", revision=COMMIT)
    ranges = [item[2].removeprefix("bytes=").split("-") for item in hub.seen("/storage/")]
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < 250_000 < len(big["model.safetensors"])
    assert (checkpoint.facts.name, checkpoint.facts.revision, checkpoint.facts.vocab_size) == ("org/name", COMMIT, 60_000)


def test_a_server_that_ignores_ranges_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"0123456789" * 5000
    files = HubFiles.__new__(HubFiles)
    files._client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, content=content)))
    files.service = hub_service("hf://org/name", "main")
    assert files._get("http://hub/x", 40_003, 5) == b"34567"


def test_the_token_goes_to_the_hub_and_not_to_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_hub(Hub(files=model_files(), token=TOKEN)) as hub:
        read_checkpoint(open_hub(hub, monkeypatch))
    assert hub.seen("/storage/") and not any(item[3] for item in hub.seen("/storage/"))
    assert all(item[3] for item in hub.seen("/resolve/"))


@pytest.mark.parametrize(
    ("faults", "revision", "reason", "word"),
    [
        ({"token": TOKEN}, "", Reason.DOWNLOAD_UNAUTHORIZED, "no token was given"),
        ({}, "nosuch", Reason.MODEL_NOT_FOUND, "nosuch"),
        ({"rate_limited": 99}, "", Reason.DOWNLOAD_RATE_LIMITED, "429"),
        ({"failures": 99}, "", Reason.DOWNLOAD_STALLED, "503"),
    ],
)
def test_a_refusal_has_its_own_reason(
    faults: dict[str, object], revision: str, reason: Reason, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub(Hub(files=model_files(), **faults)) as hub, pytest.raises(SourceError, match=word) as caught:  # type: ignore[arg-type]
        open_hub(hub, monkeypatch, revision)
    assert caught.value.reason == reason
    assert caught.value.cure


def test_a_token_that_may_not_read_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with serve_hub(Hub(files=model_files(), token=TOKEN)) as hub, pytest.raises(SourceError, match="may not read it") as caught:
        open_hub(hub, monkeypatch)
    assert "hf_another" not in str(caught.value)


def test_a_few_bad_answers_are_outlived(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(Hub(files=model_files(), rate_limited=2, failures=1)) as hub:
        assert open_hub(hub, monkeypatch).model.commit == COMMIT


def test_a_server_that_is_not_there_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(Hub(files={})) as hub:
        pass
    with pytest.raises(SourceError) as caught:
        open_hub(hub, monkeypatch)
    assert caught.value.reason == Reason.DOWNLOAD_STALLED


def test_a_listing_that_is_not_a_hubs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from gantline_runtime.sources.hub import _parse_sibling

    hostile = [
        None,
        7,
        {},
        {"rfilename": "../x", "size": 1},
        {"rfilename": "a/b", "size": 1},
        {"rfilename": "x", "size": -1},
        {"rfilename": "x", "size": "1"},
    ]
    assert [_parse_sibling(item) for item in hostile] == [None] * len(hostile)
    monkeypatch.setattr(HubFiles, "_get", lambda *args, **kwargs: b'{"sha": "../../x", "siblings": []}')
    with pytest.raises(SourceError, match="answer of"):
        HubFiles("org/name")


def test_a_file_that_is_shorter_than_listed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(Hub(files={"config.json": b"{}"})) as hub, pytest.raises(CheckpointError, match=r"config\.json"):
        open_hub(hub, monkeypatch).read("config.json", 0, 10)
