"""`gantline inspect` and `gantline fetch` of s3:// sources, against a server that verifies signatures."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gantline_runtime import cli
from gantline_runtime.artefact import MANIFEST
from gantline_runtime.checkpoint import open_checkpoint, read_checkpoint
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.sources import patience
from gantline_runtime.sources.s3 import S3Files
from gantline_runtime.sources.s3_client import open_bucket
from gantline_runtime.sources.s3_signature import Keys, encode_query, sign
from gantline_runtime.sources.uri import S3Location
from gantline_runtime.termination import Reason

from tests.runtime.checkpoint_files import model_files
from tests.runtime.fetching import kill_mid_download, last_word, names, start_fetch, wait_for_bytes
from tests.runtime.s3_server import ACCESS_KEY, Store, serve_store

FILES = {**model_files({"vocab_size": 4000}), "tokenizer.json": b"{}", "pytorch_model.bin": b"\x80", "modeling.py": b"import os"}
OBJECTS = {f"tiny/{name}": data for name, data in FILES.items()} | {"tiny/": b"", "tiny/onnx/model.onnx": b"x", "tinyer/config.json": b"{}"}
KEPT = {"config.json", "model.safetensors", "tokenizer.json", MANIFEST}
SECRET = "wJalrXUtnFEMI/K7MDENG"
URI = "s3://models/tiny"


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(tmp_path / "last-word"))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


@contextmanager
def store_with(monkeypatch: pytest.MonkeyPatch, *, keys: bool = True, **settings: Any) -> Iterator[Store]:
    with serve_store(Store(**{"objects": dict(OBJECTS), **settings})) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        if keys:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield store


def fetch(target: Path, *options: str) -> int:
    return cli.main(["fetch", URI, str(target), *options])


def test_a_model_is_inspected_and_then_fetched_as_it_was_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a/session+token=")
    with store_with(monkeypatch, secret=SECRET, session_token="a/session+token=", page=2) as store:
        assert cli.main(["inspect", URI]) == 0
        facts = json.loads(capfd.readouterr().out)
        assert fetch(tmp_path / "model", f"--revision={facts['revision']}") == 0
        assert fetch(tmp_path / "model") == 0, "what is there is not fetched again"
        store.objects["tiny/tokenizer.json"] += b" "
        assert fetch(tmp_path / "other", f"--revision={facts['revision']}") == 65
    assert "not those that were inspected" in last_word(tmp_path).message
    assert (facts["name"], facts["vocabSize"]) == ("models/tiny", 4000)
    assert names(tmp_path / "model") == KEPT
    assert open_checkpoint(tmp_path / "model").facts.fingerprint == facts["fingerprint"]
    written = capfd.readouterr()
    everything = written.out + written.err + (tmp_path / "last-word").read_text() + (tmp_path / "model" / MANIFEST).read_text()
    assert SECRET not in everything and "a/session" not in everything


def test_a_bucket_is_judged_by_headers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    big = {f"tiny/{name}": data for name, data in model_files({"vocab_size": 60_000}).items()}
    with store_with(monkeypatch, keys=False, objects=big) as store:
        read_checkpoint(S3Files(S3Location("models", "tiny/")))
    ranges = [item[2].removeprefix("bytes=").split("-") for item in store.seen("/tiny/")]
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < 250_000 < len(big["tiny/model.safetensors"])


@pytest.mark.parametrize(
    ("settings", "keys", "reason", "code", "words"),
    [
        ({"secret": "another"}, True, Reason.DOWNLOAD_UNAUTHORIZED, 77, ("SignatureDoesNotMatch", "may not read it")),
        ({"secret": SECRET}, False, Reason.DOWNLOAD_UNAUTHORIZED, 77, ("AccessDenied", "no keys were given")),
        ({"secret": SECRET, "session_token": "new"}, True, Reason.DOWNLOAD_UNAUTHORIZED, 77, ("InvalidToken",)),
        ({"objects": {"other/config.json": b"{}"}}, True, Reason.MODEL_NOT_FOUND, 66, ("no objects",)),
        ({"objects": {"tiny/readme": b"{}"}}, True, Reason.NOT_A_MODEL, 65, ("config.json",)),
        ({"rate_limited": 99}, True, Reason.DOWNLOAD_RATE_LIMITED, 75, ("429",)),
        ({"rate_limited": 1, "retry_after": "3600"}, True, Reason.DOWNLOAD_RATE_LIMITED, 75, ("wait 3600 s",)),
        ({"failures": 99}, True, Reason.DOWNLOAD_STALLED, 75, ("503",)),
        ({"stall_after": 0}, True, Reason.DOWNLOAD_STALLED, 75, ("stalled",)),
        ({"corrupt": True}, True, Reason.INVALID_CHECKPOINT, 65, ("another hash",)),
        ({"corrupt": True, "parts": True, "checksums": True}, True, Reason.INVALID_CHECKPOINT, 65, ("another hash",)),
    ],
)  # fmt: skip
def test_each_failure_has_its_reason_and_publishes_nothing(
    settings: dict[str, Any], keys: bool, reason: Reason, code: int, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.1" if "stall_after" in settings else "5")
    with store_with(monkeypatch, keys=keys, **settings):
        assert fetch(tmp_path / "model") == code
    word = last_word(tmp_path)
    assert word.reason == reason and word.cure and all(part in word.message for part in words), word
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("after", "waited"), [("7", 7.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("soon", pytest.approx(0.5, rel=0.3))]
)  # fmt: skip
def test_a_server_that_asks_to_wait_is_waited_for(after: str, waited: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    with store_with(monkeypatch, rate_limited=1, retry_after=after):
        assert fetch(tmp_path / "model") == 0
    assert waits == [waited]


def test_a_bucket_of_another_region_and_objects_uploaded_in_parts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_with(monkeypatch, secret=SECRET, region="eu-central-1", parts=True):
        assert fetch(tmp_path / "model") == 0
    assert names(tmp_path / "model") == KEPT


def test_a_connection_that_breaks_is_resumed_where_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_with(monkeypatch, cuts=2, cut_after=100_000) as store:
        assert fetch(tmp_path / "model") == 0
    assert store.starts("safetensors") == [0, 100_000, 200_000]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_killed_download_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_with(monkeypatch, secret=SECRET, stall_after=150_000) as store:
        kill_mid_download(URI, tmp_path / "model", store, received=150_000)
        assert fetch(tmp_path / "model") == 0
    assert store.starts("safetensors") == [150_000]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_fetch_that_is_told_to_go_leaves_at_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with store_with(monkeypatch, bytes_per_s=200_000) as store:
        monkeypatch.undo()  # the server's own pace needs a sleep that sleeps
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        process = start_fetch(URI, target, log=subprocess.DEVNULL)
        wait_for_bytes(target.with_name("model.partial"), 50_000)
        process.terminate()
        assert process.wait(30) == 143
        store.bytes_per_s = 0
        store.requests.clear()
        nobody = SimpleNamespace(sleep=lambda seconds: pytest.fail("there is nobody to wait for"))  # the server goes on sleeping
        monkeypatch.setattr(patience, "time", nobody)
        assert fetch(target) == 0
    assert store.starts("safetensors")[0] >= 50_000


def test_a_disk_that_fills_up_is_said_to_be_full_and_the_rest_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(write: Any, piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    with store_with(monkeypatch, stall_after=150_000) as store:
        with monkeypatch.context() as patched:
            patched.setattr("gantline_runtime.sources.transfer._write_all", full)
            assert fetch(tmp_path / "model") == 73
        assert last_word(tmp_path).reason == Reason.DISK_FULL and not (tmp_path / "model").exists()
        store.stall_after = -1
        assert fetch(tmp_path / "model") == 0


def test_an_object_that_is_replaced_during_its_download_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store_with(monkeypatch, stall_after=150_000) as store:

        def replace() -> None:
            store.stalled.wait(60)
            store.objects["tiny/model.safetensors"] = model_files({"vocab_size": 4000}, seed=2)["model.safetensors"]
            store.released.set()

        thread = threading.Thread(target=replace)
        thread.start()
        assert fetch(tmp_path / "model") == 65
        thread.join()
    assert "was replaced while it was read" in last_word(tmp_path).message
    assert "restartedAt" in last_word(tmp_path).cure


def test_a_listing_that_is_none_is_not_taken_for_an_empty_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gantline_runtime.sources import s3_client

    for body in (b"<html><body>log in</body></html>", b"not xml", b'<!DOCTYPE x [<!ENTITY a "b">]><ListBucketResult/>'):
        monkeypatch.setattr(s3_client, "take", lambda *args, body=body: body)
        with store_with(monkeypatch):
            assert fetch(tmp_path / "model") == 75
        assert "no listing" in last_word(tmp_path).message


def test_signatures_are_those_of_amazons_example() -> None:
    """The GET of a range in https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html, and its listing."""
    keys = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    now = datetime(2013, 5, 24, tzinfo=UTC)
    url = "https://examplebucket.s3.amazonaws.com/"
    signed = sign("GET", f"{url}test.txt", {"Range": "bytes=0-9"}, keys, "us-east-1", now)
    assert signed["authorization"].endswith("Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")
    signed = sign("GET", f"{url}?{encode_query({'prefix': 'J', 'max-keys': '2'})}", {}, keys, "us-east-1", now)
    assert signed["authorization"].endswith("Signature=34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")


@pytest.mark.parametrize(
    ("bucket", "settings", "address"),
    [
        ("models", {}, "https://models.s3.us-east-1.amazonaws.com/"),
        ("my.models", {"AWS_REGION": "eu-west-3"}, "https://s3.eu-west-3.amazonaws.com/my.models/"),
        ("models", {"AWS_DEFAULT_REGION": "cn-north-1"}, "https://models.s3.cn-north-1.amazonaws.com.cn/"),
        ("models", {"AWS_ENDPOINT_URL": "http://minio:9000/"}, "http://minio:9000/models/"),
        ("models", {"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "https://b/s3"}, "https://b/s3/models/"),
        ("models", {"AWS_ENDPOINT_URL": "https://oss.example", "AWS_S3_ADDRESSING_STYLE": "virtual"}, "https://models.oss.example/"),
    ],
)
def test_buckets_are_addressed_as_their_endpoint_wants(
    bucket: str, settings: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert open_bucket(bucket)._address() == address


@pytest.mark.parametrize(
    "settings",
    [{"AWS_ENDPOINT_URL": "minio:9000"}, {"AWS_REGION": "Frankfurt/1"}, {"AWS_S3_ADDRESSING_STYLE": "x"}, {"AWS_ACCESS_KEY_ID": "x"}],
)
def test_settings_that_cannot_be_meant_are_refused_with_a_cure(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        open_bucket("models")
    assert "Give" in caught.value.cure
