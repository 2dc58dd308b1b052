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


@pytest.mark.parametrize(
    ("installed", "chosen", "says"),
    [
        ({"docker": 1, "podman": 0, "buildah": 0}, "podman", ""),
        ({"buildah": 0}, "buildah", ""),
        ({"docker": 1}, "", "docker cannot build: `docker info` says why"),
        ({}, "", "none of docker, podman and buildah is installed"),
    ],
)
def test_images_are_built_by_the_first_builder_that_works(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: dict[str, int], chosen: str, says: str
) -> None:
    for name, code in installed.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if chosen:
        assert quickstart.find_builder() == chosen
    else:
        with pytest.raises(quickstart.PhaseFailed, match=says):
            quickstart.find_builder()


def test_an_image_is_named_by_its_content_so_that_changed_code_is_pulled(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "buildah").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ $1 != images ] || echo sha256:0123456789abcdef\n')
    (tmp_path / "buildah").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(quickstart, "STATE", tmp_path)
    ticker = quickstart.Ticker(1, 1, "build")
    image = quickstart.build_image("buildah", "operator", "registry.example/g", ticker)
    assert image == f"registry.example/g/operator:{quickstart.version()}-0123456789ab"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--format docker" in calls[0] and "--layers" in calls[0], "OCI's format has no health check"
    assert calls[-1] == f"push {image}"
