"""JSON schemas of clients: what is refused, and that whatever a grammar lets through is valid JSON that matches the schema."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from gantline_runtime.server.errors import ApiError
from gantline_runtime.server.json_schema import json_pattern, prepare_schema
from gantline_runtime.server.output_plan import OutputPlan
from gantline_runtime.server.structured import Constraint, json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.test_output_plan import Model

INTEGER = {"type": "integer"}
NEXT = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
NODE = {"type": "object", "properties": {"v": INTEGER, "n": NEXT}, "required": ["v", "n"]}
SCHEMAS: list[Any] = [
    {"type": "string", "maxLength": 6},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "string", "pattern": '^a["\\\\x]b{1,3}$'},
    {"type": "string", "pattern": '^"(x|\\\\|\\n\\t)+\\x22\\u0001$'},
    {"type": "string", "pattern": "^[^a-z]{3}[\"\\n-]$"},
    {"type": "string", "format": "date-time"},
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 12, "multipleOf": 3},
    {"type": "number", "minimum": 0.5, "maximum": 2},
    {"enum": [1, "a\"b", None, {"x": [1]}]},
    {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "array", "uniqueItems": True, "items": {"enum": [1]}, "maxItems": 1},
    {"type": "object", "properties": {"a": INTEGER, "b": {"const": "x"}}, "required": ["b"]},
    {"type": "object", "required": ["z"], "properties": {"a": INTEGER}, "maxProperties": 2},
    {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": INTEGER, "maxProperties": 2},
    {"type": "object", "properties": {'k"\n': INTEGER}, "required": ['k"\n']},
    {"anyOf": [INTEGER, {"type": "null"}]},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    {"type": "object", "properties": {"a": True}, "required": ["a"], "not": {"required": ["b"]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(tmp_path_factory.mktemp("schema"), special=False)
    yield model
    model.engine.close()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_what_a_grammar_lets_through_is_valid(model: Model, schema: Any) -> None:
    plan = OutputPlan(Constraint(json_format(prepare_schema(schema, "x", strict=False)), "x"))
    complete = 0
    for text, reason in model.answers(plan, 8):
        if reason == "stop":
            complete += 1
            jsonschema.validate(json.loads(text), schema)
    assert complete > 0


ITSELF = {"$ref": "#"}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (False, "x"),
        (ITSELF, "x.$ref"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "x.$ref"),
        ({"type": "object", "properties": {"a": INTEGER, "b": ITSELF}, "required": ["a", "b"]}, "x.properties.b.$ref"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": False, "minItems": 1}}, "required": ["a"]},
            "x.properties.a.items",
        ),
        ({"type": "array", "prefixItems": [INTEGER, False], "minItems": 2}, "x.prefixItems[1]"),
        ({"anyOf": [{"type": "object", "properties": {"a": ITSELF}, "required": ["a"]}, False]}, "x.anyOf[0].properties.a.$ref"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "x.minimum"),
        ({"type": "object", "properties": {"a": {"type": "string", "minLength": 2, "maxLength": 1}}}, "x.properties.a.minLength"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "x.minItems"),
        ({"$ref": "#/title", "title": "no schema"}, "x.$ref"),
        ({"$ref": "#/anyOf/0", "anyOf": [True]}, "x.$ref"),
    ],
)
def test_a_schema_that_no_finite_text_matches_is_refused_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare_schema(schema, "x", strict=False)
    assert (caught.value.status, caught.value.param) == (400, place) and str(caught.value).startswith(place)


@pytest.mark.parametrize(
    "schema",
    [
        *SCHEMAS,
        {"type": "array", "items": ITSELF},
        {"type": ["object", "null"], "properties": {"a": ITSELF}, "required": ["a"]},
        {"type": "object", "properties": {"a": False}},
        {"$ref": "#/components/a", "components": {"a": {"type": "null"}}},
        {"$ref": "#/$defs/0", "$defs": {**{str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1000)}, "1000": {"type": "null"}}},
    ],
)
def test_a_schema_that_some_text_matches_is_accepted(schema: Any) -> None:
    prepare_schema(schema, "x", strict=False)


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("^[a-z]+$", "^[a-z]+$"),
        ('"?', '(\\\\")?'),
        ("\\\\", "(\\\\\\\\)"),
        ("\\d\\n", "\\d(\\\\n)"),
        ('[^"\\]]"', '[^"\\]](\\\\")'),
        ('[]"]', '[]"]'),
        ("\\x41\\x22", '\\x41(\\\\")'),
    ],
)
def test_a_pattern_of_characters_becomes_one_of_json_text(pattern: str, written: str) -> None:
    assert json_pattern(pattern) == written


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ([], "x"),
        ({"type": "strin"}, "x.type"),
        ({"type": []}, "x.type"),
        ({"properties": {"a": 5}}, "x.properties.a"),
        ({"items": [INTEGER]}, "x.items"),
        ({"anyOf": []}, "x.anyOf"),
        ({"anyOf": [{}, {"minimum": "3"}]}, "x.anyOf[1].minimum"),
        ({"enum": []}, "x.enum"),
        ({"required": "a"}, "x.required"),
        ({"maxItems": -1}, "x.maxItems"),
        ({"maxItems": True}, "x.maxItems"),
        ({"multipleOf": 0}, "x.multipleOf"),
        ({"pattern": 1}, "x.pattern"),
        ({"$ref": "http://elsewhere"}, "x.$ref"),
        ({"$ref": "#/$defs/a"}, "x.$ref"),
    ],
)
def test_a_wrong_schema_is_refused_with_its_place(schema: Any, place: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare_schema(schema, "x", strict=False)
    assert (caught.value.param, caught.value.status, caught.value.code) == (place, 400, "invalid_value")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"not": {}}, "x.not"),
        ({"type": "array", "items": {"type": "array", "contains": {}}}, "x.items.contains"),
        ({"allOf": [{}, {}]}, "x.allOf"),
        ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}}, "x.minimum"),
        ({"anyOf": [{}], "type": "object"}, "x.type"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "x.pattern"),
        ({"type": "object", "required": ["a"]}, "x.required[0]"),
    ],
)
def test_a_strict_schema_may_rely_on_nothing_that_is_not_enforced(schema: Any, place: str) -> None:
    prepare_schema(schema, "x", strict=False)
    with pytest.raises(ApiError) as caught:
        prepare_schema(schema, "x", strict=True)
    assert caught.value.param == place


def test_annotations_are_no_constraints() -> None:
    schema = {"$ref": "#/$defs/a", "description": "d", "title": "t", "default": 1, "$defs": {"a": {**INTEGER, "examples": [1]}}}
    assert prepare_schema(schema, "x", strict=True) == schema


WORDS = ["type", "properties", "items", "anyOf", "allOf", "$ref", "$defs", "required", "enum", "pattern", "minLength", "maxItems", "not",
         "if", "object", "string", "array", "#", "#/$defs/a", "additionalProperties", "prefixItems", "minProperties", "a"]  # fmt: skip
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(WORDS) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=15,
)


@given(schema=ANY, strict=st.booleans())
@settings(max_examples=400)
def test_any_json_is_taken_or_refused(schema: Any, strict: bool) -> None:
    try:
        json.dumps(prepare_schema(schema, "x", strict=strict))
    except ApiError as error:
        assert error.status == 400 and error.param is not None and error.param.startswith("x")


@pytest.mark.parametrize("pattern", ["[" * 50_000, "[a" * 25_000 + "\\", "[^]" * 15_000, "\\" * 50_000, "[\\" * 25_000])
def test_a_pattern_is_rewritten_in_proportion_to_its_length(pattern: str) -> None:
    """It happens in the API process, where a regular expression is matched with Python's lock held."""
    began = time.process_time()
    assert len(json_pattern(pattern)) >= len(pattern)
    assert time.process_time() - began < 2
