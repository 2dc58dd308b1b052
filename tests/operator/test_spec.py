"""Objects become dataclasses, or a SpecError with path, cause and cure; never anything else."""

from __future__ import annotations

from typing import Any

import pytest
from gantline_operator.fields import SpecError
from gantline_operator.quantities import parse_quantity
from gantline_operator.spec import parse_service, parse_spec
from hypothesis import given
from hypothesis import strategies as st

from tests.operator.manifests import BAD_NAMES, BAD_URIS, FULL, GOOD_URIS, MINIMAL, UNKNOWN, WRONG, changed, service


def test_what_is_left_out_has_its_default() -> None:
    spec = parse_spec(MINIMAL)
    assert (spec.replicas, spec.suspend, spec.quantization.method, spec.accelerator.resource) == (1, False, "none", "auto")
    assert (spec.engine.tensor_parallel, spec.engine.session_len, spec.engine.max_batch_size) == (None, None, None)
    assert (spec.engine.cache_max_entry_count, spec.rollout.drain_timeout, spec.cache.size) == (0.8, 120.0, None)
    assert spec.model.served_name is None and spec.pod.env == ()


def test_every_value_arrives_in_its_python_form() -> None:
    spec = parse_spec(FULL)
    assert spec.engine.tensor_parallel == 2 and spec.engine.cache_max_entry_count == 0.7
    assert spec.accelerator.min_memory == 24 << 30 and spec.cache.size == 100 << 30
    assert spec.rollout.drain_timeout == 300.0 and spec.quantization.max_perplexity_increase == 0.05
    assert spec.pod.resources.requests == {"cpu": "2", "memory": "8Gi"}
    assert spec.pod.tolerations[0].toleration_seconds == 60
    assert spec.model.secret_ref is not None and spec.model.secret_ref.name == "hub-token"


@pytest.mark.parametrize("uri", GOOD_URIS)
def test_a_source_that_we_read_is_accepted(uri: str) -> None:
    assert parse_spec({"model": {"uri": uri}}).model.uri == uri


@pytest.mark.parametrize("uri", BAD_URIS)
def test_a_source_that_we_cannot_read_is_refused(uri: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_spec({"model": {"uri": uri}})
    assert error.value.path == "spec.model.uri"


@pytest.mark.parametrize(("spec", "path"), [*WRONG, *UNKNOWN])
def test_what_is_wrong_is_refused_with_its_path_a_cause_and_a_cure(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_spec(spec)
    assert error.value.path == path
    assert error.value.cause and error.value.cure


@pytest.mark.parametrize("name", [*BAD_NAMES, "", None, 7, "Chat", "chat-", "a b"])
def test_a_name_that_children_cannot_carry_is_refused(name: object) -> None:
    manifest = {**service(MINIMAL), "metadata": {"name": name}}
    with pytest.raises(SpecError, match=r"metadata\.name"):
        parse_service(manifest)


@pytest.mark.parametrize("change", [{"kind": "Pod"}, {"apiVersion": "v1"}, {"metadata": None}, {"spec": None}, {"spec": []}])
def test_another_kind_or_no_spec_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        parse_service({**service(MINIMAL), **change})


def test_a_whole_manifest_gives_name_and_spec() -> None:
    assert parse_service(service(MINIMAL)) == ("chat", parse_spec(MINIMAL))


def test_null_is_the_same_as_absent() -> None:
    assert parse_spec({**MINIMAL, "engine": None, "replicas": None}) == parse_spec(MINIMAL)


def test_values_in_messages_are_escaped_and_cut() -> None:
    with pytest.raises(SpecError) as error:
        parse_spec(changed("engine.backend", "\x1b[31m" + "x" * 10_000))
    assert len(str(error.value)) < 400 and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("250m", 0.25), ("1k", 1000), ("1.5Gi", 3 << 29), ("64Ti", 64 << 40), ("0", 0), ("2Pi", 2 << 50)]
)
def test_quantities_are_those_of_kubernetes(text: str, value: float) -> None:
    assert parse_quantity(text) == value


WORDS = st.sampled_from(["auto", "cpu", "24Gi", "0.5", "awq", "2m", "a/b"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS
JSON = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4), max_leaves=20)
SECTIONS = {key: sorted(value) if isinstance(value, dict) else [] for key, value in FULL.items()}


def _sections() -> st.SearchStrategy[Any]:
    """Specs with the right names and any values, which reach deeper than any JSON would."""
    parts = {key: st.one_of(JSON, st.fixed_dictionaries({}, optional=dict.fromkeys(inner, JSON))) for key, inner in SECTIONS.items()}
    model = st.one_of(st.just({"uri": "hf://a/b"}), parts.pop("model"))
    return st.fixed_dictionaries({"model": model}, optional=parts)


@given(st.one_of(JSON, _sections()))
def test_any_json_is_a_spec_or_a_spec_error(value: object) -> None:
    try:
        parse_spec(value)
    except SpecError as error:
        assert error.path.startswith("spec") and error.cause and error.cure and len(str(error)) < 2000


def test_depth_without_end_is_a_spec_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SpecError):
        parse_spec({"model": {"uri": deep}})
