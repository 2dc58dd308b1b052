"""Whether any finite JSON text matches a schema. One that needs itself, or that asks for what it forbids, would keep a model writing until
its limit, or be taken by the grammar's compiler for an empty text; here the place of the fault is found instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

__all__ = ["find_endless"]

_MAX_PASSES = 64
"""A chain of so many references, each to what stands behind it, is given up: the compiler has limits of its own."""
_SCALARS = frozenset({"string", "number", "integer", "boolean", "null"})

Resolve = Callable[[str], Any]


def find_endless(schema: Any, place: str, schemas: Iterable[Mapping[str, Any]], resolve: Resolve) -> str | None:
    """The place in `schema` (at `place`) of what no finite text matches and all texts need; None if there is none. `schemas` are all
    schemas in it, and `resolve` gives what a reference leads to, which is taken to end where it is none of them."""
    left = list(schemas)[::-1]  # inner ones first: they decide on outer ones
    endless = set(map(id, left))
    """Of which it is not known that a text can end."""
    for _ in range(_MAX_PASSES):
        found = {id(inner) for inner in left if _ends(inner, endless, resolve)}
        endless -= found
        if not found:
            return _innermost(schema, place, endless) if _is_endless(schema, endless) else None
        left = [inner for inner in left if id(inner) in endless]
    return None


def _innermost(schema: Any, place: str, endless: set[int]) -> str:
    while isinstance(schema, dict) and "$ref" not in schema:
        needed = next(((inner, where) for inner, where in _needs(schema) if _is_endless(inner, endless)), None)
        if needed is None:
            break
        schema, place = needed[0], f"{place}.{needed[1]}"
    return f"{place}.$ref" if isinstance(schema, dict) and "$ref" in schema else place


def _is_endless(schema: Any, endless: set[int]) -> bool:
    return not schema if isinstance(schema, bool) else id(schema) in endless


def _ends(schema: Mapping[str, Any], endless: set[int], resolve: Resolve) -> bool:
    """Whether a text of `schema` can end, by what is known of those that it needs."""
    if "$ref" in schema:
        return not _is_endless(resolve(schema["$ref"]), endless)
    if "enum" in schema or "const" in schema:
        return True
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return not all(_is_endless(inner, endless) for inner in schema[name])
    return _may_be_scalar(schema) or not any(_is_endless(inner, endless) for inner, _ in _needs(schema))


def _may_be_scalar(schema: Mapping[str, Any]) -> bool:
    types = schema.get("type")
    if types is None:
        return not schema.keys() & {"allOf", "properties", "items", "prefixItems"}
    return bool(_SCALARS & set(types if isinstance(types, list) else [types]))


def _needs(schema: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """What every text of `schema` holds a text of, and where it stands; of alternatives all, since they are looked at where none ends."""
    for name in ("anyOf", "oneOf", "allOf"):
        for i, inner in enumerate(schema.get(name, ())):
            yield inner, f"{name}[{i}]"
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name in properties:
            yield properties[name], f"properties.{name}"
    count, first = schema.get("minItems", 0), schema.get("prefixItems", ())
    for i, inner in enumerate(first[:count]):
        yield inner, f"prefixItems[{i}]"
    if count > len(first):
        yield schema.get("items", True), "items"
