"""JSON schemas that clients send: bounded, well formed, and, where they must be followed strictly, only of what a grammar can enforce.

The grammar's compiler would find most faults as well, but not their place. What it cannot enforce (`_UNENFORCED`) is a hint to the model at
best; a strict schema that relies on it is refused by its place. Keywords that no specification knows are annotations, as it says.
Source: JSON Schema 2020-12, https://json-schema.org/draft/2020-12/json-schema-validation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.schema_ends import find_endless

__all__ = ["prepare_schema"]

MAX_DEPTH = 32
"""Schemas within schemas: compilers take exponential time for far deeper ones."""
MAX_SCHEMAS = 5000

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_SCHEMA = ("items", "additionalProperties", "propertyNames", "not", "if", "then", "else", "contains", "unevaluatedProperties",
           "unevaluatedItems")  # fmt: skip
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains")
_RANGES = (("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"),
           ("minContains", "maxContains"))  # fmt: skip
_TEXTS = ("pattern", "format", "$ref", "title", "description", "$schema", "$id", "$comment", "$anchor")
_UNENFORCED = ("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "patternProperties",
               "dependentSchemas", "dependentRequired", "dependencies", "nullable", "$dynamicRef")  # fmt: skip
_ANNOTATIONS = ("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$defs", "definitions")


def prepare_schema(schema: Any, param: str, *, strict: bool) -> Any:
    """The schema for the compiler, hints left out. Raises ApiError with the place of the first fault in `param`."""
    checker = _Checker(schema, strict)
    checker.check(schema, param, 0)
    endless = find_endless(schema, param, checker.schemas, checker.resolve)
    if endless is not None:
        raise _fault(endless, "no text that ends matches this")
    return _without_hints(schema)


class _Checker:
    def __init__(self, root: Any, strict: bool) -> None:
        self._root, self._strict = root, strict
        self.schemas: list[dict[str, Any]] = []
        """All that were checked."""

    def check(self, schema: Any, place: str, depth: int) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise _fault(place, "a schema is an object or a boolean")
        self.schemas.append(schema)
        if depth > MAX_DEPTH:
            raise _fault(place, f"schemas lie within schemas deeper than {MAX_DEPTH}")
        if len(self.schemas) > MAX_SCHEMAS:
            raise _fault(place, f"there are more than {MAX_SCHEMAS} schemas in it")
        for name, value in schema.items():
            _check_value(name, value, f"{place}.{name}")
        _check_ranges(schema, place)
        if "$ref" in schema:
            self._check_reference(schema["$ref"], f"{place}.$ref")
        if self._strict:
            _check_enforced(schema, place)
        for inner, inner_place in _inner_schemas(schema, place):
            self.check(inner, inner_place, depth + 1)

    def _check_reference(self, reference: str, place: str) -> None:
        if reference != "#" and not reference.startswith("#/"):
            raise _fault(place, f"{reference[:100]!r} leads elsewhere; references must begin with '#/'")
        try:
            target = self.resolve(reference)
        except LookupError:
            raise _fault(place, f"{reference[:100]!r} leads nowhere") from None
        if not isinstance(target, (dict, bool)):
            raise _fault(place, f"{reference[:100]!r} leads to what is no schema")

    def resolve(self, reference: str) -> Any:
        """What a reference within the schema leads to. Raises LookupError."""
        target = self._root
        for part in reference[2:].split("/") if reference != "#" else ():
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict):
                raise LookupError(reference)
            target = target[name]
        return target


def _check_ranges(schema: dict[str, Any], place: str) -> None:
    for least, most in _RANGES:
        if least in schema and most in schema and schema[least] > schema[most]:
            raise _fault(f"{place}.{least}", f"{schema[least]} is more than {most}, {schema[most]}")


def _check_value(name: str, value: Any, place: str) -> None:
    """One keyword's value by itself."""
    if name in _SCHEMA and not isinstance(value, (dict, bool)):
        raise _fault(place, "a schema is expected")
    if name in _SCHEMAS and not (isinstance(value, list) and value):
        raise _fault(place, "a list of schemas is expected")
    if name in _NAMED_SCHEMAS and not isinstance(value, dict):
        raise _fault(place, "an object of schemas is expected")
    if name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise _fault(place, "a number is expected")
    if name == "multipleOf" and value <= 0:
        raise _fault(place, "a number above 0 is expected")
    if name in _COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _fault(place, "a number of 0 or more is expected")
    if name in _TEXTS and not isinstance(value, str):
        raise _fault(place, "a text is expected")
    if name == "required" and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise _fault(place, "a list of property names is expected")
    if name == "enum" and not (isinstance(value, list) and value):
        raise _fault(place, "a list of values is expected")
    if name == "type":
        _check_type(value, place)


def _check_type(value: Any, place: str) -> None:
    names = value if isinstance(value, list) else [value]
    for type_name in names:
        if not isinstance(type_name, str) or type_name not in _TYPES:
            raise _fault(place, f"{str(type_name)[:40]!r} is no type; types are {', '.join(_TYPES)}")
    if not names:
        raise _fault(place, "at least one type is expected")


def _check_enforced(schema: dict[str, Any], place: str) -> None:
    """What a strict schema may not rely on."""
    for name in _UNENFORCED:
        if name in schema:
            raise _unenforced(f"{place}.{name}", name)
    others = [name for name in schema if name not in _ANNOTATIONS]
    for name in ("$ref", "anyOf", "oneOf", "allOf"):
        if name in schema and len(others) > 1:
            beside = next(other for other in others if other != name)
            raise _unenforced(f"{place}.{beside}", f"{beside!r} beside {name!r}")
    if len(schema.get("allOf", ())) > 1:
        raise _unenforced(f"{place}.allOf", "allOf of several schemas")
    if "pattern" in schema and ("minLength" in schema or "maxLength" in schema):
        raise _unenforced(f"{place}.pattern", "a pattern together with a length")
    if not schema.get("additionalProperties"):
        for i, name in enumerate(schema.get("required", ())):
            if name not in schema.get("properties", ()):
                raise _fault(f"{place}.required[{i}]", f"{name[:100]!r} is required, but not among the properties")


def _without_hints(schema: Any) -> Any:
    """The compiler takes some that it cannot enforce for a promise that nothing else comes: an array of `uniqueItems` alone for `[]`."""
    if not isinstance(schema, dict):
        return schema
    kept = {name: _map_schemas(name, value) for name, value in schema.items() if name not in _UNENFORCED}
    undeclared = [name for name in schema.get("required", ()) if name not in schema.get("properties", ())]
    if undeclared and not schema.get("additionalProperties"):
        kept["properties"] = {**kept.get("properties", {}), **dict.fromkeys(undeclared, True)}
    if "pattern" in kept:
        kept["pattern"] = json_pattern(kept["pattern"])
    elif "format" not in kept and "string" in _types(kept) and kept.keys() & {"minLength", "maxLength"}:
        # By itself the compiler would allow control characters here, which JSON does not.
        kept["pattern"] = f"^.{{{kept.pop('minLength', 0)},{kept.pop('maxLength', '')}}}$"
    if "minProperties" in kept and not kept.get("properties") and "additionalProperties" not in kept:
        kept["additionalProperties"] = True
    return kept


def _types(schema: dict[str, Any]) -> list[Any]:
    value = schema.get("type", [])
    return value if isinstance(value, list) else [value]


_PATTERN_PART = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|c[A-Za-z]|.)|\[\^?\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)|.", re.DOTALL)
"""An escape, a class, or a character. A class without an end goes on to the pattern's: tried again from each of many brackets, a pattern of
30 KB took a minute, with Python's lock held."""
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}


def json_pattern(pattern: str) -> str:
    """A pattern of a string's characters as one of its JSON text: the compiler matches the text. Quotes, backslashes and control characters
    that it names become their JSON escapes; in classes the compiler leaves them out itself."""
    return "".join(_json_part(part) for part in _PATTERN_PART.findall(pattern))


def _json_part(part: str) -> str:
    char = part
    if part.startswith("\\") and len(part) > 1:
        code = part[1:]
        if code[0] in "xu" and len(code) > 1:
            char = chr(int(code[1:], 16))
        elif code[0] == "c" and len(code) > 1:
            char = chr(ord(code[1].upper()) - 64)
        else:
            char = _CONTROLS.get(code, code if code in '"\\' else part)
    if len(char) == 1 and (char in '"\\' or char < " "):
        return f"({re.escape(json.dumps(char)[1:-1])})"
    return part


def _map_schemas(name: str, value: Any) -> Any:
    if name == "propertyNames" and isinstance(value, dict):
        return _without_hints({"type": "string", **value})
    if name in _SCHEMA:
        return _without_hints(value)
    if name in _SCHEMAS:
        return [_without_hints(inner) for inner in value]
    return {key: _without_hints(inner) for key, inner in value.items()} if name in _NAMED_SCHEMAS else value


def _inner_schemas(schema: dict[str, Any], place: str) -> Iterator[tuple[Any, str]]:
    for name, value in schema.items():
        if name in _SCHEMA:
            yield value, f"{place}.{name}"
        elif name in _SCHEMAS:
            for i, inner in enumerate(value):
                yield inner, f"{place}.{name}[{i}]"
        elif name in _NAMED_SCHEMAS:
            for key, inner in value.items():
                yield inner, f"{place}.{name}.{key}"


def _fault(place: str, cause: str) -> ApiError:
    return ApiError(400, f"{place[:300]}: {cause}.", code="invalid_value", param=place[:300])


def _unenforced(place: str, what: str) -> ApiError:
    message = f"{place[:300]}: {what} cannot be enforced. Leave it out, or set strict to false and take it for a hint."
    return ApiError(400, message, code="unsupported_parameter", param=place[:300])
