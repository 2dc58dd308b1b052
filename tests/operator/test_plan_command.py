"""`gantline plan` through its front door: files, standard input, a real API server; its answer, its exit code, its complaints."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_devcluster.api_only import ApiCluster
from gantline_operator.plan import Plan, plan
from gantline_operator.plan_status import to_status
from gantline_operator.spec import parse_spec
from gantline_runtime.cli import main

from tests.operator.definition import wait_until_served
from tests.operator.manifests import MINIMAL, service
from tests.operator.planning import MODELS, cluster_of, node_objects

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(service(MINIMAL)))
    nodes = {"apiVersion": "v1", "kind": "List", "items": node_objects("h100", "a10*2")}
    (tmp_path / "nodes.yaml").write_text(yaml.safe_dump(nodes))
    (tmp_path / "facts.json").write_text(json.dumps(MODELS["8b"].to_json()))
    return tmp_path


def _plan(folder: Path, *more: str, service: str = "service.yaml", nodes: str = "nodes.yaml", facts: str = "facts.json") -> int:
    arguments = ["plan", "-f", str(folder / service), "--nodes", str(folder / nodes)]
    return main([*arguments, *(["--facts", str(folder / facts)] if facts else []), *more])


def test_a_plan_is_a_table_that_a_person_can_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(folder) == 0
    text = capsys.readouterr().out
    assert "1 x NVIDIA-H100-80GB-HBM3" in text and "2 x NVIDIA-A10, bfloat16  NotPreferred" in text
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_a_plan_is_the_planners_own(folder: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    assert _plan(folder, "-o", output) == 0
    report = yaml.safe_load(capsys.readouterr().out)
    expected = plan(parse_spec(MINIMAL), MODELS["8b"], cluster_of("h100", "a10*2"), {"cuda": "cuda", "cpu": "cpu"})
    assert isinstance(expected, Plan)
    assert {**report["plan"], "rejected": report["rejected"]} == {**to_status(expected), "arguments": report["plan"]["arguments"]}
    assert "--backend=cuda" in report["plan"]["arguments"] and report["planned"] is True


def test_a_rejection_says_why_and_what_to_do_and_exits_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "nodes.yaml").write_text(yaml.safe_dump_all(node_objects("cpu*2")))
    assert _plan(folder) == 1
    text = capsys.readouterr().out
    assert "rejected: NoMatchingGPU" in text and "accelerator.resource: cpu" in text
    assert _plan(folder, "-o", "json") == 1
    assert json.loads(capsys.readouterr().out)["reason"] == "NoMatchingGPU"


def test_pods_among_the_nodes_count_as_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pods = [_pod(f"train-{index}", "h100-0", 8 // 2) for index in range(2)]
    (folder / "nodes.yaml").write_text(yaml.safe_dump({"kind": "List", "items": [*node_objects("h100"), *pods]}))
    assert _plan(folder) == 0
    assert "WaitingForCapacity" in capsys.readouterr().out


def _pod(name: str, node: str, gpus: int) -> dict[str, Any]:
    container = {"name": "main", "image": "x", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    return {"kind": "Pod", "metadata": {"name": name, "uid": name}, "spec": {"nodeName": node, "containers": [container]}, "status": {}}


def test_several_services_of_one_file_share_the_gpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"chat-{index}" for index in range(10)]
    (folder / "many.yaml").write_text(yaml.safe_dump_all([service(MINIMAL, name) for name in names]))
    (folder / "one.yaml").write_text(yaml.safe_dump_all(node_objects("h100")))
    assert _plan(folder, "-o", "json", service="many.yaml", nodes="one.yaml") == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["service"] for report in reports] == [f"default/{name}" for name in names]
    assert [report["plan"]["waiting"] for report in reports] == [False] * 8 + [True] * 2


def test_pools_of_an_inventory_are_known_shapes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "nodes.yaml").write_text(yaml.safe_dump_all(node_objects("cpu")))
    pool = {"name": "h", "nodeSelector": {"pool": "h"}, "resource": "nvidia.com/gpu", "count": 8}
    pool |= {"memory": "80Gi", "computeCapability": "9.0"}
    for inventory in ([pool], {"kind": "ConfigMap", "data": {"pools": yaml.safe_dump([pool])}}):
        (folder / "inventory.yaml").write_text(yaml.safe_dump(inventory))
        assert _plan(folder, "--inventory", str(folder / "inventory.yaml")) == 0
        assert "pool in (h)" in capsys.readouterr().out


def test_a_folder_is_inspected_on_the_spot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = service({**MINIMAL, "accelerator": {"resource": "cpu"}})
    (folder / "service.yaml").write_text(yaml.safe_dump(cpu))
    assert _plan(folder, "--model", str(ROOT / "examples/tiny-model"), facts="") == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_the_manifest_may_come_on_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(service(MINIMAL))))
    assert main(["plan", "-f", "-", "--nodes", str(folder / "nodes.yaml"), "--facts", str(folder / "facts.json")]) == 0
    assert "default/chat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "clause"),
    [
        ({"service.yaml": "a: ["}, "is not YAML"),
        ({"service.yaml": "kind: Pod"}, "holds no InferenceService"),
        ({"service.yaml": ""}, "holds no InferenceService"),
        ({"service.yaml": yaml.safe_dump(service({**MINIMAL, "replicas": -1}))}, "spec.replicas: -1"),
        ({"service.yaml": yaml.safe_dump(service({**MINIMAL, "engin": {}}))}, "spec.engin: there is no such field"),
        ({"nodes.yaml": "kind: Pod"}, "holds no Node"),
        ({"facts.json": "[]"}, "model facts"),
        ({"facts.json": json.dumps({**MODELS["8b"].to_json(), "numLayers": 0})}, "numLayers is 0"),
        ({"inventory.yaml": "[{name: x}]"}, "pools[0].nodeSelector"),
        ({"inventory.yaml": "data"}, "no pools"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(
    folder: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], clause: str
) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    inventory = ["--inventory", str(folder / "inventory.yaml")] if "inventory.yaml" in files else []
    assert _plan(folder, *inventory) >= 64
    error = capsys.readouterr().err
    assert clause in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["-f", "x"], ["-f", "x", "--nodes", "y", "--cluster"], ["-f", "/nowhere", "--nodes", "y"], ["--images", "tpu"]]
)
def test_bad_flags_are_refused_with_the_way_to_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 64
    assert capsys.readouterr().err.startswith("gantline: ")


def test_a_claim_needs_facts_or_a_copy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(folder, facts="") >= 64
    assert "--facts FILE" in capsys.readouterr().err


def test_an_image_that_is_not_named_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(folder, "--images", "cpu") == 1
    assert "NoRuntimeImage" in capsys.readouterr().out


def test_without_a_cluster_the_error_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "kubeconfig").write_text(json.dumps({"apiVersion": "v1", "kind": "Config"}))
    assert main(["plan", "-f", str(folder / "service.yaml"), "--cluster", "--kubeconfig", str(folder / "kubeconfig")]) >= 64
    assert "no cluster" in capsys.readouterr().err


def test_a_cluster_is_read_with_its_pods_and_what_other_services_were_promised(
    folder: Path, simulated_nodes: ApiCluster, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = simulated_nodes
    cluster.kubectl("apply", "-f", str(ROOT / "crds/gantline.io_inferenceservices.yaml"))
    wait_until_served(cluster)
    cluster.simulate("h100")
    command = ["plan", "-f", str(folder / "service.yaml"), "--cluster", "--kubeconfig", str(cluster.kubeconfig)]
    command += ["-n", namespace, "-o", "json"]
    facts = ["--facts", str(folder / "facts.json")]
    assert main([*command, *facts]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["plan"]["waiting"] is False and first["service"] == f"{namespace}/chat"

    _create_service(cluster, namespace, "other", {"replicas": 8}, first)
    assert main([*command, *facts]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["waiting"] is True, "the other service's eight pods have no node yet"

    _create_service(cluster, namespace, "chat", {}, first)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["model"] == first["model"], "the facts are those of its status"


def _create_service(cluster: ApiCluster, namespace: str, name: str, change: dict[str, Any], report: dict[str, Any]) -> None:
    manifest = service({**MINIMAL, **change}, name)
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(manifest))
    status = {"status": {"plan": {k: v for k, v in report["plan"].items() if k != "arguments"}, "model": report["model"]}}
    cluster.kubectl("patch", "gisvc", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", json.dumps(status))
