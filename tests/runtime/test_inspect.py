"""`gantline inspect`: facts on stdout and in the termination message, or the reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gantline_runtime import cli, termination
from gantline_runtime.model_facts import ModelFacts
from gantline_runtime.termination import Reason

from tests.runtime.checkpoint_files import CONFIG, model_files, write_files
from tests.runtime.hub_server import COMMIT, Hub, serve_hub

TINY = Path(__file__).parents[2] / "examples" / "tiny-model"


@pytest.fixture
def last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination-log"
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return path


def message(path: Path) -> termination.TerminationMessage:
    parsed = termination.parse(path.read_text())
    assert parsed is not None
    return parsed


def test_a_folders_facts_are_printed_and_left_for_the_operator(last_word: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"file://{TINY}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert message(last_word).reason == Reason.COMPLETED
    assert message(last_word).facts == printed
    facts = ModelFacts.from_json(printed)
    assert (facts.family, facts.num_layers, facts.num_kv_heads, facts.weight_bytes) == ("llama", 6, 2, 11_540_992)
    assert len(last_word.read_bytes()) < termination.MAX_BYTES


def test_a_repositorys_facts_carry_its_name_and_commit(last_word: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(Hub(files=model_files())) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert cli.main(["inspect", "hf://org/name", "--revision", "main"]) == 0
    assert (message(last_word).facts["name"], message(last_word).facts["revision"]) == ("org/name", COMMIT)


@pytest.mark.parametrize(
    ("files", "reason", "code"),
    [
        (None, Reason.MODEL_NOT_FOUND, 66),
        ({}, Reason.NOT_A_MODEL, 65),
        ({"config.json": b'{"architectures": ["BertModel"]}'}, Reason.UNSUPPORTED_ARCHITECTURE, 65),
        ({"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b"\x80"}, Reason.UNSAFE_WEIGHTS, 65),
        (model_files() | {"model.safetensors": model_files()["model.safetensors"][:-9]}, Reason.INVALID_CHECKPOINT, 65),
        (model_files() | {"config.json": json.dumps(CONFIG | {"quantization_config": {}}).encode()}, Reason.INVALID_QUANTIZATION, 65),
    ],
)
def test_what_is_no_model_leaves_its_reason(
    files: dict[str, bytes] | None, reason: Reason, code: int, last_word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if files is not None:
        write_files(folder, files)
    assert cli.main(["inspect", str(folder)]) == code
    assert message(last_word).reason == reason
    assert message(last_word).cure
    assert message(last_word).message in capsys.readouterr().err


def test_a_token_is_in_no_output(last_word: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mysecret")
    with serve_hub(Hub(files=model_files(), token="hf_right")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert cli.main(["inspect", "hf://org/name"]) == 77
    captured = capfd.readouterr()
    assert message(last_word).reason == Reason.DOWNLOAD_UNAUTHORIZED
    assert "hf_mysecret" not in captured.out + captured.err + last_word.read_text()
