"""`gantline fetch` against a server that speaks the hub's HTTP: whole or not there, resumable, checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gantline_runtime import artefact, cli
from gantline_runtime.artefact import MANIFEST, Manifest, Staging
from gantline_runtime.checkpoint import open_checkpoint
from gantline_runtime.errors import CapacityError, ConfigurationError
from gantline_runtime.sources import patience
from gantline_runtime.termination import Reason

from tests.runtime.checkpoint_files import CONFIG, model_files
from tests.runtime.fetching import kill_mid_download, last_word, names
from tests.runtime.hub_server import COMMIT, SIGNATURE, Hub, serve_hub

FILES = {
    **model_files({"vocab_size": 4000}),
    "tokenizer.json": b'{"model": {}}',
    "README.md": b"# a model\n",
    "pytorch_model.bin": b"\x80\x02evil",
    "modeling_evil.py": b"import os",
}
KEPT = {"config.json", "model.safetensors", "tokenizer.json", "README.md", MANIFEST}


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(tmp_path / "last-word"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)  # bytes on disk at a time: what a cut can lose
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


@contextmanager
def hub_with(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes] = FILES, **faults: Any) -> Iterator[Hub]:
    with serve_hub(Hub(files=files, **faults)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def fetch(target: Path) -> int:
    return cli.main(["fetch", "hf://org/name", str(target)])


def test_a_model_is_fetched_without_what_could_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_with(monkeypatch):
        assert fetch(tmp_path / "model") == 0
    assert names(tmp_path / "model") == KEPT
    assert not (tmp_path / "model.partial").exists()
    assert open_checkpoint(tmp_path / "model").facts.vocab_size == 4000
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert (manifest["kind"], manifest["inputs"]["revision"], manifest["facts"]["name"]) == ("fetch", COMMIT, "org/name")
    word = last_word(tmp_path)
    assert word.reason == Reason.COMPLETED
    assert word.artefact["facts"] == manifest["facts"]
    assert word.artefact["bytes"] == sum(len(FILES[name]) for name in KEPT - {MANIFEST})


def test_what_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_with(monkeypatch) as hub:
        assert fetch(tmp_path / "model") == 0
        before = len(hub.requests)
        assert fetch(tmp_path / "model") == 0
    assert len(hub.requests) == before + 1  # the listing
    assert last_word(tmp_path).reason == Reason.COMPLETED


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with hub_with(monkeypatch):
        assert fetch(tmp_path / "model") == 64
    assert names(tmp_path / "model") == {"mine.txt"}


def test_a_connection_that_breaks_is_resumed_where_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_with(monkeypatch, cuts=2, cut_after=100_000) as hub:
        assert fetch(tmp_path / "model") == 0
    downloads = [item[2] for item in hub.seen("/storage/") if item[0] == "GET"]
    resumed = [int(item.removeprefix("bytes=")[:-1]) for item in downloads if item.endswith("-")]
    assert resumed and all(start > 80_000 for start in resumed), downloads
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_storage_that_asks_to_wait_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    with hub_with(monkeypatch, storage_rate_limited=2, retry_after="7"):
        assert fetch(tmp_path / "model") == 0
    assert waits == [8.0, 8.0], "huggingface_hub adds a second"
    with hub_with(monkeypatch, storage_rate_limited=99):
        assert fetch(tmp_path / "other") == 75
    assert last_word(tmp_path).reason == Reason.DOWNLOAD_RATE_LIMITED


def test_a_killed_download_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with hub_with(monkeypatch, stall_after=150_000) as hub:
        kill_mid_download("hf://org/name", target, hub, received=100_000)
        assert fetch(target) == 0
        assert hub.starts("/storage/")[0] >= 100_000
    assert (target / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert names(target) == KEPT


def test_a_download_that_stalls_says_so_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.file_download

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    with hub_with(monkeypatch, stall_after=0):
        assert fetch(tmp_path / "model") == 75
    assert last_word(tmp_path).reason == Reason.DOWNLOAD_STALLED
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("faults", "reason", "code"),
    [
        ({"token": "hf_right"}, Reason.DOWNLOAD_UNAUTHORIZED, 77),
        ({"rate_limited": 99}, Reason.DOWNLOAD_RATE_LIMITED, 75),
        ({"files": {}}, Reason.NOT_A_MODEL, 65),
        ({"files": {"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"\x80"}}, Reason.UNSAFE_WEIGHTS, 65),
        ({"files": model_files() | {"config.json": b'{"architectures": ["BertModel"]}'}}, Reason.UNSUPPORTED_ARCHITECTURE, 65),
    ],
)
def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(
    faults: dict[str, Any], reason: Reason, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_with(monkeypatch, **faults) as hub:
        assert fetch(tmp_path / "model") == code
    assert last_word(tmp_path).reason == reason
    assert not [item for item in hub.seen("/storage/") if item[2].endswith("-") or not item[2]]
    assert not (tmp_path / "model").exists()


def test_a_file_that_differs_from_the_listing_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gantline_runtime.commands import fetch as command

    real = command._download

    def tampered(source: Any, wanted: Any, folder: Path) -> Any:
        fetched = real(source, wanted, folder)
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        return fetched

    with hub_with(monkeypatch):
        monkeypatch.setattr(command, "_download", tampered)
        assert fetch(tmp_path / "model") == 65
        assert "another hash" in last_word(tmp_path).message
        monkeypatch.setattr(command, "_download", real)
        assert fetch(tmp_path / "model") == 0  # the bad file was thrown away


def test_a_full_disk_is_seen_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    with hub_with(monkeypatch) as hub:
        assert fetch(tmp_path / "model") == 73
    assert last_word(tmp_path).reason == Reason.DISK_FULL
    assert "Free" in last_word(tmp_path).cure
    assert not [item for item in hub.seen("/storage/") if item[2].endswith("-")]


class _Usage:
    free = 10 << 20


def test_secrets_are_in_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mysecret")
    with hub_with(monkeypatch, token="hf_mysecret", cuts=1, cut_after=1000) as hub:
        assert fetch(tmp_path / "model") == 0
    captured = capfd.readouterr()
    written = captured.out + captured.err + (tmp_path / "last-word").read_text() + (tmp_path / "model" / MANIFEST).read_text()
    assert "hf_mysecret" not in written and SIGNATURE not in written
    assert not any(item[3] for item in hub.seen("/storage/"))


# The folder that is whole or not there


def publish(target: Path) -> None:
    with Staging(target) as staging:
        (staging.folder / "x").write_text("x")
        (staging.folder / "x").chmod(0o600)
        staging.publish(Manifest("fetch", 1, {"of": "x"}, 1, {}))


def test_a_published_folder_can_be_read_by_other_users(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    assert (tmp_path / "a" / "x").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path / "a") == {"x", MANIFEST}


def test_two_processes_do_not_write_the_same_folder(tmp_path: Path) -> None:
    with Staging(tmp_path / "a"), pytest.raises(ConfigurationError, match="another process"), Staging(tmp_path / "a"):
        pass


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with Staging(tmp_path / "a") as staging:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").write_text("mine")
        with pytest.raises(ConfigurationError, match="appeared"):
            staging.publish(Manifest("fetch", 1, {}, 1, {}))
    assert names(tmp_path / "a") == {"mine"}


def test_an_empty_folder_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    publish(tmp_path / "a")
    assert artefact.find_artefact(tmp_path / "a", "fetch", 1, {"of": "x"}) is not None


@pytest.mark.parametrize("inputs", [{"of": "y"}, {}])
def test_an_artefact_of_other_inputs_is_not_mistaken_for_ours(inputs: dict[str, str], tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with pytest.raises(ConfigurationError, match="other inputs"):
        artefact.find_artefact(tmp_path / "a", "fetch", 1, inputs)


def test_a_disk_that_fills_up_while_writing_is_said_to_be_full(tmp_path: Path) -> None:
    with pytest.raises(CapacityError) as caught, Staging(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert caught.value.reason == Reason.DISK_FULL
