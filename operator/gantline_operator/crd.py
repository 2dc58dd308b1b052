"""The CustomResourceDefinition and docs/api.md, made from the dataclasses of `resource.py` and `resource_status.py`.

`python -m gantline_operator.crd` (or `make crds`) writes both; a test compares them with what is checked in. The schema is structural,
every list, map and text is bounded (the API server bounds the cost of CEL rules by them), and it stays far below the 262,144 bytes that
client-side `kubectl apply` can store.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from gantline_operator.api_docs import build_docs
from gantline_operator.fields import Object
from gantline_operator.resource import GROUP, KIND, NAME_RULE, PLURAL, SHORT_NAME, VERSION, InferenceServiceSpec
from gantline_operator.resource_status import InferenceServiceStatus

__all__ = ["COLUMNS", "build_crd", "render_crd"]

_HEADER = "# Made by `make crds` from operator/gantline_operator/resource.py: do not edit.\n"

COLUMNS = (
    ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status', 0),
    ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason', 0),
    ("Model", "string", ".spec.model.uri", 0),
    ("Backend", "string", ".status.plan.backend", 0),
    ("TP", "integer", ".status.plan.tensorParallel", 0),
    ("Replicas", "integer", ".status.replicas", 0),
    ("URL", "string", ".status.url", 0),
    ("GPU", "string", ".status.plan.product", 1),
    ("Precision", "string", ".status.plan.precision", 1),
    ("Host", "string", ".spec.ingress.host", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)
"""Name, type, path, priority; priority 1 is shown by `-o wide` only."""


def build_crd() -> dict[str, Any]:
    """The CustomResourceDefinition as plain JSON."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": [SHORT_NAME],
                "categories": ["gantline"],
            },
            "versions": [_version()],
        },
    }


def _version() -> dict[str, Any]:
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [_column(*column) for column in COLUMNS],
        "schema": {"openAPIV3Schema": _schema()},
    }


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    return {**column, "priority": priority} if priority else column


def _schema() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "A managed deployment of one model behind an OpenAI-compatible address.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": {"description": InferenceServiceSpec.__doc__, **Object(InferenceServiceSpec).schema()},
            "status": {"description": InferenceServiceStatus.__doc__, **Object(InferenceServiceStatus).schema()},
        },
        "x-kubernetes-validations": [NAME_RULE.schema()],
    }


def render_crd() -> str:
    """The CustomResourceDefinition as YAML."""
    return _HEADER + yaml.dump(build_crd(), Dumper=_Dumper, sort_keys=False, width=140, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # kubectl reads aliases, people do not


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the CustomResourceDefinition and docs/api.md.")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository's folder (default: here)")
    parser.add_argument("--print", action="store_true", help="print the CustomResourceDefinition and write nothing")
    options = parser.parse_args()
    if options.print:
        sys.stdout.write(render_crd())
        return 0
    for name, text in ((f"crds/{GROUP}_{PLURAL}.yaml", render_crd()), ("docs/api.md", build_docs())):
        target = options.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
