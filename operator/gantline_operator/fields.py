"""What a field of the resource may hold: one declaration gives its schema, its parser and its line in docs/api.md.

    tensor_parallel: int | None = declare(AutoOr(Whole(1, 8)), "GPUs that share each layer.", default="auto")

A `Kind` knows both sides of a field: `schema()` for the API server, `parse()` for an object that came from one, or from a file that
no server has seen. `parse` trusts nothing and raises only `SpecError`, which names the path, a cause and a cure.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = [
    "ABSENT",
    "REQUIRED",
    "AutoOr",
    "Choice",
    "Flag",
    "Kind",
    "ListOf",
    "MapOf",
    "Object",
    "Rule",
    "SpecError",
    "Text",
    "Whole",
    "camel",
    "declare",
    "kind_of",
    "parse_object",
    "shown",
    "wrong",
]

Schema = dict[str, Any]
_SURROGATE = re.compile("[\ud800-\udfff]")


class SpecError(ValueError):
    """An object that breaks the schema or one of its rules. `path` is as the API server writes it, `spec.engine.tensorParallel`."""

    def __init__(self, path: str, cause: str, cure: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.path, self.cause, self.cure = path, cause, cure


class _Marker:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


REQUIRED = _Marker("REQUIRED")
ABSENT = _Marker("ABSENT")
"""Default of a field that may be left out and then has no value: None in Python, nothing in the schema."""


@dataclass(frozen=True)
class Rule:
    """A condition between fields: `cel` for the API server, `holds` for a file that no server has seen. `path` is relative, `.revision`."""

    cel: str
    holds: Callable[[Any], bool]
    message: str
    path: str = ""

    def schema(self) -> Schema:
        rule = {"rule": self.cel, "message": self.message, "reason": "FieldValueInvalid"}
        return {**rule, "fieldPath": self.path} if self.path else rule


class Kind(Protocol):
    """One sort of value."""

    def schema(self) -> Schema:
        """OpenAPI v3 schema in Kubernetes' structural subset."""

    def parse(self, value: object, path: str) -> Any:
        """The Python value. Raises SpecError."""

    def describe(self) -> str:
        """The type as docs/api.md writes it."""


def declare(kind: Kind, help: str, *, default: Any = ABSENT, rules: tuple[Rule, ...] = ()) -> Any:
    """A dataclass field; `default` is JSON, as a person would write it in a manifest."""
    metadata = {"kind": kind, "help": help, "default": default, "rules": rules}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if default is ABSENT:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(default_factory=lambda: kind.parse(default, "default"), metadata=metadata)


def kind_of(item: dataclasses.Field[Any]) -> Kind:
    kind: Kind = item.metadata["kind"]
    return kind


@functools.cache
def camel(name: str) -> str:
    """The JSON name of a Python field."""
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def shown(value: object) -> str:
    """An untrusted value as a message may print it."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def wrong(path: str, value: object, expected: str) -> SpecError:
    return SpecError(path, f"{shown(value)} is not {expected}", f"Give {expected}.")


@dataclass(frozen=True)
class Text:
    """A string of `min_length` to `max_length` characters that matches all of `pattern` (RE2 and Python agree on what is used here)."""

    max_length: int
    pattern: str = ""
    expected: str = ""
    min_length: int = 0

    def schema(self) -> Schema:
        schema: Schema = {"type": "string", "maxLength": self.max_length}
        if self.min_length:
            schema["minLength"] = self.min_length
        if self.pattern:
            schema["pattern"] = f"^({self.pattern})$"
        return schema

    def parse(self, value: object, path: str) -> str:
        expected = self.expected or f"a text of {self.min_length} to {self.max_length} characters"
        if not isinstance(value, str) or not self.min_length <= len(value) <= self.max_length or _unprintable(value):
            raise wrong(path, value, expected)
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise wrong(path, value, expected)
        return value

    def describe(self) -> str:
        return "string"


def _unprintable(value: str) -> bool:
    """Lone surrogates, which JSON can spell and no API server stores."""
    return _SURROGATE.search(value) is not None


@dataclass(frozen=True)
class Choice:
    choices: tuple[str | int, ...]

    def schema(self) -> Schema:
        return {"type": "integer" if isinstance(self.choices[0], int) else "string", "enum": list(self.choices)}

    def parse(self, value: object, path: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in self.choices:
            raise wrong(path, value, self.describe())
        return value

    def describe(self) -> str:
        return " or ".join(str(c) for c in self.choices)


@dataclass(frozen=True)
class Whole:
    """A whole number. `among` narrows it to a few."""

    minimum: int
    maximum: int
    among: tuple[int, ...] = ()

    def schema(self) -> Schema:
        schema: Schema = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        if self.maximum >= 1 << 31:
            schema["format"] = "int64"
        return schema

    def parse(self, value: object, path: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a JSON writer may spell 8 as 8.0, and the API server accepts it
        if not isinstance(value, int) or isinstance(value, bool) or not self.allows(value):
            raise wrong(path, value, self.describe())
        return value

    def allows(self, value: int) -> bool:
        return value in self.among if self.among else self.minimum <= value <= self.maximum

    def describe(self) -> str:
        return " or ".join(map(str, self.among)) if self.among else f"{self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class AutoOr:
    """`auto` (None in Python) or a whole number; `kubectl explain` shows the default as a value."""

    whole: Whole

    def schema(self) -> Schema:
        allowed = f"self >= {self.whole.minimum} && self <= {self.whole.maximum}"
        if self.whole.among:
            allowed = f"self in {list(self.whole.among)}"
        rule = f"type(self) == string ? self == 'auto' : ({allowed})"
        message = f"must be auto, or {self.whole.describe()}"
        return {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 16,
            "x-kubernetes-validations": [{"rule": rule, "message": message, "reason": "FieldValueInvalid"}],
        }

    def parse(self, value: object, path: str) -> int | None:
        if value == "auto":
            return None
        try:
            return self.whole.parse(value, path)
        except SpecError:
            raise wrong(path, value, self.describe()) from None

    def describe(self) -> str:
        return f"auto, or {self.whole.describe()}"


@dataclass(frozen=True)
class Flag:
    def schema(self) -> Schema:
        return {"type": "boolean"}

    def parse(self, value: object, path: str) -> bool:
        if not isinstance(value, bool):
            raise wrong(path, value, "true or false")
        return value

    def describe(self) -> str:
        return "boolean"


@dataclass(frozen=True)
class ListOf:
    """A list, a tuple in Python. With `key`, a list map: items are told apart by that field and merged by server-side apply."""

    item: Kind
    max_items: int
    key: str = ""

    def schema(self) -> Schema:
        schema: Schema = {"type": "array", "maxItems": self.max_items, "items": self.item.schema()}
        if self.key:
            return {**schema, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [self.key]}
        return {**schema, "x-kubernetes-list-type": "atomic"}

    def parse(self, value: object, path: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise wrong(path, value, "a list")
        if len(value) > self.max_items:
            raise SpecError(path, f"{len(value)} items are too many", f"Give at most {self.max_items} items.")
        items = tuple(self.item.parse(item, f"{path}[{index}]") for index, item in enumerate(value))
        keys = [getattr(item, self.key) for item in items] if self.key else []
        if len(set(keys)) != len(keys):
            raise SpecError(path, f"two items have the same {self.key}", f"Give each item a {self.key} of its own.")
        return items

    def describe(self) -> str:
        return f"list of {self.item.describe()}"


@dataclass(frozen=True)
class MapOf:
    """A map of texts. `keys` narrows its keys to a few, which then become properties; otherwise keys are label names."""

    value: Kind
    max_items: int = 16
    keys: tuple[str, ...] = ()

    def schema(self) -> Schema:
        if self.keys:
            return {"type": "object", "properties": {key: self.value.schema() for key in self.keys}}
        return {"type": "object", "maxProperties": self.max_items, "additionalProperties": self.value.schema()}

    def parse(self, value: object, path: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise wrong(path, value, "a map")
        if len(value) > self.max_items:
            raise SpecError(path, f"{len(value)} entries are too many", f"Give at most {self.max_items} entries.")
        return {self._key(key, path): self.value.parse(item, f"{path}.{shown(key)[1:-1]}") for key, item in value.items()}

    def _key(self, key: object, path: str) -> str:
        if self.keys and key not in self.keys:
            raise SpecError(f"{path}.{shown(key)[1:-1]}", "there is no such field", f"Known fields: {', '.join(self.keys)}.")
        if not isinstance(key, str) or not re.fullmatch(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", key):
            raise wrong(path, key, "a label's name")
        return key

    def describe(self) -> str:
        return f"map of {', '.join(self.keys)} to {self.value.describe()}" if self.keys else f"map of label to {self.value.describe()}"


@dataclass(frozen=True)
class Object:
    """A nested object: a dataclass whose fields were made by `declare`, and whose class attribute `RULES` bind them."""

    cls: type

    def schema(self) -> Schema:
        properties, required = {}, []
        for item in dataclasses.fields(self.cls):
            properties[camel(item.name)] = field_schema(item)
            if item.metadata["default"] is REQUIRED:
                required.append(camel(item.name))
        schema: Schema = {"type": "object", "properties": properties}
        if required:
            schema["required"] = required
        rules: tuple[Rule, ...] = getattr(self.cls, "RULES", ())
        if rules:
            schema["x-kubernetes-validations"] = [rule.schema() for rule in rules]
        return schema

    def parse(self, value: object, path: str) -> Any:
        return parse_object(self.cls, value, path)

    def describe(self) -> str:
        return "object"


def field_schema(item: dataclasses.Field[Any]) -> Schema:
    """A field's schema with its description and default."""
    schema = kind_of(item).schema()
    rules = [*schema.get("x-kubernetes-validations", []), *(rule.schema() for rule in item.metadata["rules"])]
    schema = {"description": item.metadata["help"], **schema}
    if rules:
        schema["x-kubernetes-validations"] = rules
    if item.metadata["default"] not in (REQUIRED, ABSENT):
        schema["default"] = filled(kind_of(item), item.metadata["default"])
    return schema


def filled(kind: Kind, default: Any) -> Any:
    """An object's default with its fields' defaults in it: the API server checks a default against the object's rules as it stands."""
    if not isinstance(kind, Object):
        return default
    known = {camel(item.name): (kind_of(item), item.metadata["default"]) for item in dataclasses.fields(kind.cls)}
    return {**{key: filled(*pair) for key, pair in known.items() if pair[1] not in (REQUIRED, ABSENT)}, **default}


def parse_object(cls: type, value: object, path: str) -> Any:
    """The dataclass `cls` from JSON. null and absent are the same, as they are for the API server. Raises SpecError."""
    if not isinstance(value, Mapping):
        raise wrong(path, value, "an object")
    items = {camel(item.name): item for item in dataclasses.fields(cls)}
    for key in value:
        if key not in items:
            raise SpecError(f"{path}.{shown(key)[1:-1]}", "there is no such field", f"Known fields: {', '.join(items)}.")
    given = {items[key].name: kind_of(items[key]).parse(item, f"{path}.{key}") for key, item in value.items() if item is not None}
    for key, item in items.items():
        if item.metadata["default"] is REQUIRED and item.name not in given:
            raise SpecError(f"{path}.{key}", "it is missing", f"Give {key}: {item.metadata['help']}")
    result = cls(**given)
    _check_rules(cls, result, path)
    return result


def _check_rules(cls: type, result: Any, path: str) -> None:
    rules: tuple[Rule, ...] = getattr(cls, "RULES", ())
    for rule in rules:
        if not rule.holds(result):
            raise SpecError(path + rule.path, rule.message, "Change one of the fields that the rule names.")
    for item in dataclasses.fields(cls):
        for rule in item.metadata["rules"]:
            value = getattr(result, item.name)
            if value is not None and not rule.holds(value):
                raise SpecError(f"{path}.{camel(item.name)}", rule.message, "Change the value.")
