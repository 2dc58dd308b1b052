"""Every manifest under examples/: accepted by the API server strictly, understood by the parser, and saying what it is for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_devcluster.api_only import ApiCluster
from gantline_operator.crd import render_crd
from gantline_operator.spec import parse_service

from tests.operator.definition import wait_until_served

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MANIFESTS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


@pytest.fixture(scope="module")
def definition(api_cluster: ApiCluster) -> ApiCluster:
    """The cluster, with our CustomResourceDefinition served."""
    api_cluster.kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=gantline-operator", "-f", "-", input=render_crd())
    wait_until_served(api_cluster)
    return api_cluster


def documents(name: str) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all((EXAMPLES / name).read_text()) if item]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_api_server_accepts_it_strictly(definition: ApiCluster, name: str) -> None:
    result = definition.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", str(EXAMPLES / name))
    assert len(result.stdout.splitlines()) == sum(len(item.get("items", [item])) for item in documents(name))


def test_client_side_apply_works_too(definition: ApiCluster) -> None:
    result = definition.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(EXAMPLES / "quickstart.yaml"))
    assert "inferenceservice.gantline.io/chat created" in result.stdout


def test_an_unknown_field_is_refused_by_strict_validation(definition: ApiCluster) -> None:
    text = (EXAMPLES / "quickstart.yaml").read_text().replace("  accelerator:", "  accelerater:")
    result = definition.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", input=text, check=False)
    assert result.returncode != 0 and 'unknown field "spec.accelerater"' in result.stderr


@pytest.mark.parametrize("name", MANIFESTS)
def test_it_opens_with_what_it_is_for(name: str) -> None:
    assert re.match(r"# [A-Z].{40,}", (EXAMPLES / name).read_text())


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_operator_understands_it(name: str) -> None:
    for item in documents(name):
        if item["kind"] == "InferenceService":
            assert parse_service(item)[0] == item["metadata"]["name"]


def test_the_quickstart_needs_nothing_but_the_images_and_a_default_storage_class() -> None:
    (manifest,) = documents("quickstart.yaml")
    name, spec = parse_service(manifest)
    assert (name, spec.model.uri, spec.accelerator.resource, spec.quantization.method) == (
        "chat", "file:///opt/gantline/tiny-model", "cpu", "awq",
    )  # fmt: skip
    assert spec.cache.claim_name is None and spec.cache.storage_class_name is None


def test_the_documents_name_only_examples_that_exist() -> None:
    root = EXAMPLES.parent
    texts = [path.read_text() for path in [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *EXAMPLES.glob("*.yaml")]]
    named = {name for text in texts for name in re.findall(r"examples/[\w-]+\.yaml", text)}
    assert not {name for name in named if not (root / name).exists()}
