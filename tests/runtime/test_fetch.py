"""`gantline fetch` against a server that speaks the hub's HTTP: whole or not there, resumable, checked."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gantline_runtime import artefact, cli, volume_lock
from gantline_runtime.artefact import MANIFEST, Manifest, Recipe, Staging
from gantline_runtime.checkpoint import open_checkpoint
from gantline_runtime.commands import evict
from gantline_runtime.errors import CapacityError, ConfigurationError
from gantline_runtime.sources import patience
from gantline_runtime.termination import Reason
from gantline_runtime.volume_lock import VolumeLock

from tests.runtime.checkpoint_files import CONFIG, model_files
from tests.runtime.fetching import last_word, names, start_fetch, wait_for_bytes
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
    monkeypatch.setattr(volume_lock, "STALE_S", 0.5)


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


def test_a_caller_keeps_its_own_answer_to_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with hub_with(monkeypatch):
        assert fetch(tmp_path / "model") == 0
        assert signal.getsignal(signal.SIGTERM) is before
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine.txt").touch()
        assert fetch(tmp_path / "other") == 64
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_with(monkeypatch) as hub:
        assert fetch(tmp_path / "model") == 0
        before = len(hub.requests)
        assert fetch(tmp_path / "model") == 0
    assert len(hub.requests) == before + 1  # the listing
    assert last_word(tmp_path).reason == Reason.COMPLETED


def test_the_answer_tells_what_else_the_volume_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody may have noted: the operator learns of it from Jobs that are there anyway."""
    target, whole, half = "fetch-00000000aa", "awq-00000000bb", "fetch-00000000cc"
    publish(tmp_path / whole)
    with Staging(tmp_path / half) as staging:
        (staging.folder / "weights").write_bytes(b"12345")
    with hub_with(monkeypatch):
        assert fetch(tmp_path / target) == 0
    told = last_word(tmp_path).artefact
    assert told["found"] == {whole: 1, target: told["bytes"]} and told["halves"] == {half: 5}


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


def test_of_two_that_fetch_the_same_one_waits_and_goes_on_where_the_other_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with hub_with(monkeypatch, stall_after=150_000) as hub:
        first = start_fetch("hf://org/name", target, log=subprocess.DEVNULL)
        assert hub.stalled.wait(60)
        wait_for_bytes(target.with_name("model.partial"), 100_000)
        second = start_fetch("hf://org/name", target)
        assert second.stderr is not None
        line = next(line for line in second.stderr if "waiting for" in line)
        assert json.loads(line)["progress"] == 0.0, "the operator shows the line in the service's status"
        first.kill()
        first.wait()
        assert not target.exists()
        hub.stall_after = -1
        hub.requests.clear()
        assert second.wait(60) == 0
        second.stderr.close()
        resumed = [item[2] for item in hub.seen("/storage/") if item[0] == "GET" and item[2].endswith("-")]
        assert resumed and int(resumed[0].removeprefix("bytes=").removesuffix("-")) >= 100_000
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
    assert (tmp_path / "a" / "x").stat().st_mode & 0o777 == 0o664
    assert names(tmp_path / "a") == {"x", MANIFEST}


def test_what_another_process_made_meanwhile_is_found_by_the_one_that_waited(tmp_path: Path) -> None:
    publish(tmp_path / "a")
    with Staging(tmp_path / "a", Recipe("fetch", 1, {"of": "x"})) as staging:
        assert staging.done is not None
        assert not staging.folder.exists()


def test_a_damaged_artefact_is_repaired_and_what_is_whole_of_it_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with hub_with(monkeypatch) as hub:
        assert fetch(target) == 0
        (target / "tokenizer.json").write_bytes(b"{}")
        hub.requests.clear()
        assert fetch(target) == 0
        assert not [item for item in hub.seen("/storage/") if item[2].endswith("-") or not item[2]], "the weights were whole"
    assert (target / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert names(target) == KEPT


def test_each_byte_of_an_artefact_can_be_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    with hub_with(monkeypatch):
        assert fetch(target) == 0
    files = json.loads((target / MANIFEST).read_text())["files"]
    weights = FILES["model.safetensors"]
    assert {"name": "model.safetensors", "size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()} in files
    assert {item["name"] for item in files} == KEPT - {MANIFEST}
    assert cli.main(["verify", str(target)]) == 0
    (target / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert cli.main(["verify", str(target)]) == 65
    assert "model.safetensors has another hash" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path)]) == 65, "a folder without a manifest"


def test_a_damaged_artefact_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path / "a")
    (tmp_path / "a" / "x").unlink()
    assert cli.main(["serve", str(tmp_path / "a")]) == 65
    assert "x is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_files_elsewhere_is_no_manifest(name: str, tmp_path: Path) -> None:
    publish(tmp_path / "a")
    values = json.loads((tmp_path / "a" / MANIFEST).read_text())
    values["files"][0]["name"] = name
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(values))
    assert artefact.read_manifest(tmp_path / "a") is None


def test_eviction_removes_what_is_named_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, kept, half, busy = "fetch-0123456789", "awq-0123456789", "fetch-00000000aa", "fetch-00000000bb"
    for name in (gone, kept, busy):
        publish(tmp_path / name)
    with Staging(tmp_path / half):
        pass
    monkeypatch.setattr(evict, "STALE_S", 0.0)
    monkeypatch.setattr(evict, "POLL_S", 0.02)
    monkeypatch.setattr(volume_lock, "STALE_S", 60.0)
    with VolumeLock(tmp_path, busy):
        assert cli.main(["evict", str(tmp_path), gone, half, busy]) == 0
        word = last_word(tmp_path)
        assert cli.main(["evict", str(tmp_path), busy]) == 73, "nothing could go: another try at once would come to the same"
        assert last_word(tmp_path).reason is Reason.DISK_FULL and f"{busy} is being made" in last_word(tmp_path).message
    assert word.artefact == {"kind": "evict", "evicted": [gone, half], "left": [busy], "found": {kept: 1, busy: 1}, "halves": {}}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")} == {kept, busy}
    for name in ("../x", "model", ".gantline-locks", "fetch-0123456789.partial"):
        assert cli.main(["evict", str(tmp_path), name]) == 64


def test_a_look_tells_what_killed_processes_left_half_made(tmp_path: Path) -> None:
    whole, half, torn, both = "fetch-00000000aa", "fetch-00000000bb", "awq-00000000cc", "awq-00000000dd"
    for name in (whole, torn, both):
        publish(tmp_path / name)
    (tmp_path / torn / MANIFEST).unlink()
    for name in (half, both):
        with Staging(tmp_path / name) as staging:
            (staging.folder / "weights").write_bytes(b"12345")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "somebody's model").mkdir()
    assert cli.main(["evict", str(tmp_path)]) == 0
    found = {"found": {whole: 1, both: 1}, "halves": {half: 5, torn: 1, both: 5}}
    assert last_word(tmp_path).artefact == {"kind": "evict", "evicted": [], "left": [], **found}
    assert cli.main(["evict", str(tmp_path), half, torn, both]) == 0
    assert last_word(tmp_path).artefact["found"] == {whole: 1} and not last_word(tmp_path).artefact["halves"]


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
