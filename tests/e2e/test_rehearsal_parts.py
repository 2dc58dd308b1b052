"""What the rehearsal's steps stand on, without images and a cluster; its steps run by `make rehearsal`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gantline_devcluster.node.cluster import NodeCluster

from scripts.rehearsal import gateways
from scripts.rehearsal.cluster import ROOT, Rehearsal, RehearsalFailed


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    """With a kubectl that warns, as the real one does, and answers with what lies in `answer`."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\necho 'Warning: v1 ComponentStatus is deprecated' >&2\ncat {tmp_path}/answer\n")
    kubectl.chmod(0o755)
    return Rehearsal(NodeCluster("nowhere"), {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-m", "scripts.rehearsal", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--without-runtime" in done.stdout, done.stderr


def test_a_warning_of_kubectl_is_no_part_of_an_answer(rehearsal: Rehearsal, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text('{"items": [{"metadata": {"uid": "a"}}]}')
    assert rehearsal.serving_pods() == {"a"}
    with pytest.raises(RehearsalFailed, match=r"exit code 3\nsaid\n\nwarned"):
        rehearsal.run("sh", "-c", "echo said; echo warned >&2; exit 3")


def test_what_does_not_come_true_ends_the_step_with_the_clusters_state(rehearsal: Rehearsal, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text("pod/chat Pending")
    with pytest.raises(RehearsalFailed, match="not so that it rains\npod/chat Pending"):
        rehearsal.until("it rains", lambda: False, timeout_s=0)


def test_series_of_a_metric_are_added_up_by_label(rehearsal: Rehearsal, tmp_path: Path) -> None:
    (tmp_path / "answer").write_text(
        "# HELP gantline_gateway_requests_total Requests.\ngantline_gateway_sharing 2.0\n"
        'gantline_gateway_requests_total{namespace="a",outcome="ok",service="x"} 3.0\n'
        'gantline_gateway_requests_total{namespace="a",outcome="ok",service="y"} 4.0\n'
        'gantline_gateway_requests_total{namespace="a",outcome="busy",service="y"} 9.0\n'
    )
    assert gateways.metric(rehearsal, "pod", "gantline_gateway_sharing") == 2
    assert gateways.metric(rehearsal, "pod", "gantline_gateway_requests_total", outcome="ok") == 7
    assert gateways.metric(rehearsal, "pod", "gantline_gateway_requests") == 0
