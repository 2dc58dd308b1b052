"""What `make quickstart` says before it does anything, and how it reads the logs of what it waits for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts/quickstart.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


def test_another_cluster_without_a_repository_is_one_sentence_and_exit_code_2() -> None:
    done = subprocess.run(["make", "quickstart", "KUBECONFIG=/nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("gantline:")] == [
        "gantline: another cluster needs IMAGE_REPOSITORY=... too: you push to it, its nodes pull from it."
    ]


def test_a_repository_without_a_cluster_is_refused_too(quickstart: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["--image-repository", "registry.example/x"]) == 2
    assert "KUBECONFIG" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"progress": 0.5, "message": "layer 3 of 6", "eta_s": 9}', "[############............]  50% layer 3 of 6, 9 s left"),
        ('{"progress": 7, "phase": "weights"}', "[########################] 100% weights"),
        ('{"message": "listening"}', ""),
        ("not json", ""),
        ("[1]", ""),
    ],
)
def test_progress_of_a_log_line_is_a_bar(quickstart: ModuleType, line: str, shown: str) -> None:
    assert quickstart.bar(line) == shown


def test_a_failed_phase_names_itself_its_cause_and_its_log(quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "STATE", tmp_path)
    with pytest.raises(quickstart.PhaseFailed, match="no such thing") as failure:
        quickstart.run(["bash", "-c", "echo trying; echo no such thing; exit 3"], log="try")
    assert failure.value.log and failure.value.log.read_text() == "trying\nno such thing\n"
