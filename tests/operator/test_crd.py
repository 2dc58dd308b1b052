"""The CustomResourceDefinition is what is checked in, and a real API server accepts, enforces and explains it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_devcluster.api_only import ApiCluster
from gantline_operator.crd import COLUMNS, build_crd, render_crd
from gantline_operator.plan import Plan
from gantline_operator.plan_status import to_status
from gantline_operator.resource import GROUP, PLURAL

from tests.operator.definition import wait_until_served
from tests.operator.manifests import BAD_NAMES, BAD_URIS, FULL, GOOD_URIS, MINIMAL, UNKNOWN, WRONG, changed, service
from tests.operator.planning import MODELS, accepted, cluster_of

ROOT = Path(__file__).resolve().parents[2]
CHECKED_IN = ROOT / f"crds/{GROUP}_{PLURAL}.yaml"


def test_the_definition_that_is_checked_in_is_the_generated_one() -> None:
    assert CHECKED_IN.read_text() == render_crd(), "run `make crds`"
    assert yaml.safe_load(CHECKED_IN.read_text()) == build_crd()


def test_the_definition_is_small_enough_for_client_side_apply() -> None:
    """kubectl keeps what it applied as compact JSON in an annotation; all annotations together may have 262,144 bytes."""
    assert len(json.dumps(build_crd(), separators=(",", ":"))) < 60_000


def test_everything_is_bounded_and_described() -> None:
    version = build_crd()["spec"]["versions"][0]
    problems = list(_unbounded(version["schema"]["openAPIV3Schema"]["properties"]["spec"], "spec"))
    problems += list(_unbounded(version["schema"]["openAPIV3Schema"]["properties"]["status"], "status"))
    assert not problems


def _unbounded(schema: dict[str, Any], path: str) -> Iterator[str]:
    kind = schema.get("type")
    if kind == "string" and "maxLength" not in schema and "enum" not in schema:
        yield f"{path}: maxLength"
    if kind == "array":
        if "maxItems" not in schema:
            yield f"{path}: maxItems"
        yield from _unbounded(schema["items"], path + "[]")
    if isinstance(schema.get("additionalProperties"), dict):
        if "maxProperties" not in schema:
            yield f"{path}: maxProperties"
        yield from _unbounded(schema["additionalProperties"], path + ".*")
    for name, inner in schema.get("properties", {}).items():
        if "description" not in inner and not path.endswith(("requests", "limits")):
            yield f"{path}.{name}: description"
        yield from _unbounded(inner, f"{path}.{name}")


def test_the_command_writes_what_the_tests_compare(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gantline_operator.crd", "--root", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(run.stdout.splitlines()) == 2
    assert (tmp_path / CHECKED_IN.relative_to(ROOT)).read_text() == CHECKED_IN.read_text()
    assert (tmp_path / "docs/api.md").read_text() == (ROOT / "docs/api.md").read_text()


# -- on a real API server --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def definition(api_cluster: ApiCluster) -> ApiCluster:
    """The cluster with our definition established, applied as a user would: from the client's side."""
    api_cluster.kubectl("apply", "-f", str(CHECKED_IN))
    wait_until_served(api_cluster)
    return api_cluster


def _create(cluster: ApiCluster, namespace: str, manifest: dict[str, Any], *flags: str) -> subprocess.CompletedProcess[str]:
    return cluster.kubectl("create", "--namespace", namespace, "-f", "-", *flags, input=json.dumps(manifest), check=False)


def test_the_definition_is_structural_and_its_rules_are_affordable(definition: ApiCluster) -> None:
    live = json.loads(definition.kubectl("get", "crd", f"{PLURAL}.{GROUP}", "-o", "json").stdout)
    conditions = {c["type"]: c["status"] for c in live["status"]["conditions"]}
    assert conditions["Established"] == "True" and conditions["NamesAccepted"] == "True"
    assert conditions.get("NonStructuralSchema", "False") == "False"


@pytest.mark.parametrize("spec", [MINIMAL, FULL])
def test_what_is_right_is_stored_with_its_defaults(definition: ApiCluster, namespace: str, spec: dict[str, Any]) -> None:
    done = _create(definition, namespace, service(spec), "-o", "json", "--validate=strict")
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout)["spec"]
    assert stored["replicas"] == spec.get("replicas", 1)
    assert stored["engine"]["tensorParallel"] == spec.get("engine", {}).get("tensorParallel", "auto")
    assert stored["rollout"]["drainTimeout"] and stored["quantization"]["groupSize"] and stored["cache"]["accessMode"]


def _refusals(cluster: ApiCluster, namespace: str, manifests: list[dict[str, Any]]) -> list[str]:
    """What the server says to each, in one go over HTTP: a kubectl a manifest would take seconds."""
    answers = []
    path = f"/apis/{GROUP}/v1alpha1/namespaces/{namespace}/{PLURAL}?dryRun=All&fieldValidation=Strict"
    for manifest in manifests:
        try:
            cluster.client.post(path, manifest)
            answers.append("")
        except Exception as error:
            answers.append(str(error))
    return answers


def test_what_is_wrong_is_refused_with_the_fields_path(definition: ApiCluster, namespace: str) -> None:
    answers = _refusals(definition, namespace, [service(spec) for spec, _ in WRONG])
    missed = [(path, answer[:300]) for (_, path), answer in zip(WRONG, answers, strict=True) if path not in answer]
    assert not missed


def test_an_unknown_field_is_refused_by_strict_validation(definition: ApiCluster, namespace: str) -> None:
    answers = _refusals(definition, namespace, [service(spec) for spec, _ in UNKNOWN])
    missed = [(path, answer[:300]) for (_, path), answer in zip(UNKNOWN, answers, strict=True) if "unknown field" not in answer]
    assert not missed
    done = _create(definition, namespace, service(UNKNOWN[1][0]))
    assert done.returncode != 0 and 'unknown field "spec.engine.sesionLen"' in done.stderr, "kubectl is strict by default"


def test_an_unknown_field_is_a_warning_otherwise(definition: ApiCluster, namespace: str) -> None:
    done = _create(definition, namespace, service(UNKNOWN[1][0]), "--validate=warn")
    assert done.returncode == 0 and "Warning" in done.stderr and "spec.engine.sesionLen" in done.stderr


def test_sources_and_names_are_judged_as_the_parser_judges_them(definition: ApiCluster, namespace: str) -> None:
    good = [service({"model": {"uri": uri}}) for uri in GOOD_URIS]
    assert _refusals(definition, namespace, good) == [""] * len(good)
    bad = _refusals(definition, namespace, [service({"model": {"uri": uri}}) for uri in BAD_URIS])
    assert [uri for uri, answer in zip(BAD_URIS, bad, strict=True) if "spec.model.uri" not in answer] == []
    names = _refusals(definition, namespace, [service(MINIMAL, name) for name in BAD_NAMES])
    assert [name for name, answer in zip(BAD_NAMES, names, strict=True) if "metadata.name must be" not in answer] == []


def test_kubectl_explains_every_level(definition: ApiCluster) -> None:
    text = definition.kubectl("explain", "gisvc.spec.engine").stdout
    assert "tensorParallel" in text and "auto: the smallest number" in " ".join(text.split())
    assert "maxPerplexityIncrease" in definition.kubectl("explain", "gisvc.spec.quantization").stdout
    assert "rejected" in definition.kubectl("explain", "inferenceservice.status.plan").stdout


def test_the_columns_show_what_the_status_says(definition: ApiCluster, namespace: str) -> None:
    _create(definition, namespace, service(MINIMAL))
    plan = accepted(MODELS["8b"], cluster_of("a10"))
    _patch_status(definition, namespace, _status(plan))
    header, row = definition.kubectl("get", "gisvc", "--namespace", namespace, "-o", "wide").stdout.splitlines()
    assert header.split() == ["NAME", *(name.upper() for name, *_ in COLUMNS)]
    assert row.split()[:8] == ["chat", "False", "Starting", "pvc://models/llama", "cuda", "2", "1", "http://chat"]
    assert row.split()[8:-1] == ["NVIDIA-A10", "bfloat16"]
    narrow = definition.kubectl("get", "inferenceservices", "--namespace", namespace).stdout.splitlines()[0].split()
    assert narrow == ["NAME", "READY", "REASON", "MODEL", "BACKEND", "TP", "REPLICAS", "URL", "AGE"]
    assert "chat" in definition.kubectl("get", "gantline", "--namespace", namespace).stdout, "the category"


def _status(plan: Plan) -> dict[str, Any]:
    times = {"lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}
    condition = {"type": "Ready", "status": "False", "reason": "Starting", **times}
    model = {"inputs": "0" * 10, **MODELS["70b-awq"].to_json()}
    selector = "gantline.io/service=chat"
    return {
        "observedGeneration": 1, "replicas": 1, "readyReplicas": 0, "selector": selector, "url": "http://chat", "model": model,
        "plan": to_status(plan), "conditions": [condition],
    }  # fmt: skip


def _patch_status(cluster: ApiCluster, namespace: str, status: dict[str, Any]) -> dict[str, Any]:
    patch = json.dumps({"status": status})
    done = cluster.kubectl(
        "patch", "gisvc", "chat", "--namespace", namespace, "--subresource=status", "--type=merge", "-p", patch, "-o", "json"
    )
    stored: dict[str, Any] = json.loads(done.stdout)["status"]
    return stored


def test_a_status_of_ours_is_stored_whole(definition: ApiCluster, namespace: str) -> None:
    """Nothing that the planner writes is pruned: a plan must come back as it was."""
    _create(definition, namespace, service(MINIMAL))
    status = _status(accepted(MODELS["8b"], cluster_of("a10", "h100", "mig-mixed", "t4-shared")))
    assert _patch_status(definition, namespace, status) == status


def test_the_scale_subresource_reads_and_writes_replicas(definition: ApiCluster, namespace: str) -> None:
    _create(definition, namespace, service(MINIMAL))
    _patch_status(definition, namespace, _status(accepted(MODELS["8b"], cluster_of("a10"))))
    definition.kubectl("scale", "gisvc/chat", "--replicas=3", "--namespace", namespace)
    scale = json.loads(definition.kubectl("get", "--raw", f"/apis/{GROUP}/v1alpha1/namespaces/{namespace}/{PLURAL}/chat/scale").stdout)
    assert scale["spec"] == {"replicas": 3}
    assert scale["status"] == {"replicas": 1, "selector": "gantline.io/service=chat"}


def test_the_status_cannot_be_written_through_the_object_nor_the_spec_through_the_status(definition: ApiCluster, namespace: str) -> None:
    _create(definition, namespace, {**service(changed("replicas", 2)), "status": {"url": "http://forged"}})
    live = json.loads(definition.kubectl("get", "gisvc", "chat", "--namespace", namespace, "-o", "json").stdout)
    assert "status" not in live and live["spec"]["replicas"] == 2
