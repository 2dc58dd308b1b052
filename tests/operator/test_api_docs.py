"""docs/api.md is generated, and names every field of the resource."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gantline_operator.api_docs import build_docs, walk
from gantline_operator.crd import build_crd
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.resource_status import InferenceServiceStatus

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/api.md"


def test_the_document_that_is_checked_in_is_the_generated_one() -> None:
    assert DOCUMENT.read_text() == build_docs(), "run `make crds`"


def test_every_field_of_the_schema_has_a_row_and_a_meaning() -> None:
    text = DOCUMENT.read_text()
    schema = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    missing = [path for path in _paths(schema["spec"], "spec") + _paths(schema["status"], "status") if f"| `{path}` |" not in text]
    assert not missing


def _paths(schema: dict[str, Any], path: str) -> list[str]:
    found = []
    for name, inner in schema.get("properties", {}).items():
        if path.endswith((".requests", ".limits")):
            continue
        here = f"{path}.{name}"
        found.append(here)
        found += _paths(inner, here) + _paths(inner.get("items", {}), here + "[]")
    return found


def test_every_field_explains_itself_in_a_sentence() -> None:
    for root, path in ((InferenceServiceSpec, "spec"), (InferenceServiceStatus, "status")):
        for here, item in walk(root, path):
            help = item.metadata["help"]
            assert len(help) > 5 and help[0].isupper() | help[0].islower() and help.rstrip().endswith((".", '."')), f"{here}: {help}"


def test_every_rule_between_fields_is_in_the_document() -> None:
    text = DOCUMENT.read_text()
    schema = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    messages = [rule["message"] for rule in _rules(schema) if not rule["message"].startswith("must be ")]
    assert len(messages) > 10 and not [message for message in messages if message not in text]


def _rules(schema: dict[str, Any]) -> list[dict[str, str]]:
    inner = [*schema.get("properties", {}).values(), schema.get("items", {})]
    return [*schema.get("x-kubernetes-validations", []), *(rule for part in inner for rule in _rules(part))] if schema else []
