"""docs/api.md: every field of the resource with its type, default and meaning, made from the same dataclasses as the schema."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from gantline_operator.fields import ABSENT, REQUIRED, ListOf, Object, Rule, camel, kind_of
from gantline_operator.resource import GROUP, KIND, NAME_RULE, SHORT_NAME, VERSION, InferenceServiceSpec
from gantline_operator.resource_status import InferenceServiceStatus

__all__ = ["build_docs", "walk"]

_INTRODUCTION = f"""<!-- Made by `make crds` from operator/gantline_operator/resource.py: do not edit. -->
# {KIND} (`{GROUP}/{VERSION}`, short name `{SHORT_NAME}`)

`kubectl explain {SHORT_NAME}.spec.engine` shows the same in a terminal. A field that is left out has its default; `auto` is a value that
the planner resolves, and `status.plan` shows what became of it. Quantities are Kubernetes' (`24Gi`).
"""


def walk(cls: type, path: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(path, field) of all fields under the dataclass `cls`, depth first in the order of their declaration; `[]` marks lists."""
    for item in dataclasses.fields(cls):
        here = f"{path}.{camel(item.name)}"
        yield here, item
        kind = kind_of(item)
        inner = kind.item if isinstance(kind, ListOf) else kind
        if isinstance(inner, Object):
            yield from walk(inner.cls, here + "[]" if isinstance(kind, ListOf) else here)


def build_docs() -> str:
    """docs/api.md."""
    parts = [_INTRODUCTION, "## Spec\n", _table(InferenceServiceSpec, "spec", defaults=True), "## Rules\n", _rules()]
    parts += ["## Status\n", "Written by the operator alone.\n", _table(InferenceServiceStatus, "status", defaults=False)]
    return "\n".join(parts)


def _table(cls: type, path: str, *, defaults: bool) -> str:
    head = "| field | type | default | meaning |\n|---|---|---|---|\n" if defaults else "| field | type | meaning |\n|---|---|---|\n"
    rows = []
    for here, item in walk(cls, path):
        cells = [f"`{here}`", kind_of(item).describe(), *([_default(item.metadata["default"])] if defaults else []), item.metadata["help"]]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return head + "".join(rows)


def _default(value: object) -> str:
    if value is REQUIRED:
        return "required"
    return "" if value is ABSENT or value in ({}, []) else f"`{json.dumps(value)}`"


def _rules() -> str:
    lines = ["What the API server refuses beside wrong types, unknown choices and numbers out of range:\n", f"- {NAME_RULE.message}."]
    lines += [f"- `{path}`: {rule.message}." for path, rule in _all_rules()]
    return "\n".join(lines) + "\n"


def _all_rules() -> Iterator[tuple[str, Rule]]:
    for rule in InferenceServiceSpec.RULES:
        yield "spec" + rule.path, rule
    for here, item in walk(InferenceServiceSpec, "spec"):
        kind = kind_of(item)
        inner = kind.item if isinstance(kind, ListOf) else kind
        for rule in item.metadata["rules"]:
            yield here, rule
        if isinstance(inner, Object):
            for rule in getattr(inner.cls, "RULES", ()):
                yield here + ("[]" if isinstance(kind, ListOf) else "") + rule.path, rule
