"""Reasoning and tool calls in models' text: what is found, and that it does not depend on how the text was cut."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from gantline_runtime.parsers.chain import ChainedParser
from gantline_runtime.parsers.events import Event, OutputParser, gather, joined
from gantline_runtime.parsers.reasoning import REASONING_FORMATS, ReasoningParser
from gantline_runtime.parsers.tool_calls import HeldToolParser, ToolParser
from gantline_runtime.parsers.tool_formats import TOOL_FORMATS, ToolFormat, choose_tool_format
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ("get_weather", "f")
ARGUMENTS = '{"city": "São \\"Paulo\\" {[", "n": [1, {"a": null}]}'


def parse(parser: OutputParser, pieces: list[str]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return joined([*events, *parser.finish()])


def tool_parser(name: str) -> ToolParser:
    return ToolParser(TOOL_FORMATS[name], NAMES)


def canonical(kind: ToolFormat, *calls: tuple[str, str]) -> str:
    written = [f"{kind.before_name}{name}{kind.after_name}{arguments}{kind.after_arguments}" for name, arguments in calls]
    return kind.opening + kind.separator.join(written) + kind.closing


def found(name: str, text: str) -> tuple[str, list[tuple[str, object]]]:
    content, reasoning, calls = gather(parse(tool_parser(name), [text]))
    assert not reasoning
    return content, [(called, json.loads(arguments)) for called, arguments in calls]


# ---- what is found


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_calls_in_the_canonical_form_are_found(name: str) -> None:
    text = canonical(TOOL_FORMATS[name], ("get_weather", ARGUMENTS), ("f", "{}"))
    assert found(name, text) == ("", [("get_weather", json.loads(ARGUMENTS)), ("f", {})])


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", 'Let me see.\n<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>\n', "Let me see.", [("f", {"a": 1})]),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_call>', "", [("f", {"a": 1})]),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),
        ("hermes", '<tool_call>{"name":"f"}</tool_call> and <tool_call>{"name":"f","arguments":{}}</tool_call>', "and", [("f", {})] * 2),
        ("mistral", '[TOOL_CALLS] [{"name":"f","arguments":{"a":1}},{"name":"f","arguments":{}}]', "", [("f", {"a": 1}), ("f", {})]),
        ("mistral", 'Wait. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{}', "Wait.", [("f", {"a": 1}), ("get_weather", {})]),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', "", [("f", {"a": 1})]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
        ("llama3_json", '\n{"type":"function","name":"f","parameters":{"a":1}};{"name":"f"}', "", [("f", {"a": 1}), ("f", {})]),
        (
            "deepseek_v3",
            "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "Hm.",
            [("f", {})],
        ),
    ],
)
def test_what_models_write_freely_is_found(name: str, text: str, content: str, calls: list[tuple[str, object]]) -> None:
    got_content, got_calls = found(name, text)
    assert got_calls == calls and got_content.strip() == content


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {\'a\': 1}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": '),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>'),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", "a <tool_cal"),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("mistral", '[TOOL_CALLS] [{"name":"f","arguments":{"a":1}}] and more'),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", "[TOOL_CALLS]"),
        ("llama3_json", '{"name": "Bob", "parameters": {}}'),
        ("llama3_json", '{"name": "f", "parameters": {}} is what you asked for.'),
        ("llama3_json", 'I say {"name": "f", "parameters": {}}'),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜>"),
    ],
)
def test_what_is_no_call_comes_back_unchanged(name: str, text: str) -> None:
    assert found(name, text) == (text, [])


def test_halves_of_characters_in_arguments_stay_valid_json() -> None:
    _, _, calls = gather(parse(tool_parser("hermes"), ['<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>']))
    assert json.loads(calls[0][1].encode()) == {"a": "\ud83d"}


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
        ("\n<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("Hm.\n\nSo.\n</think>\nYes.\n", True, "Hm.\n\nSo.", "Yes.\n"),
        ("No thought.", False, "", "No thought."),
        ("  a <think>b</think>", False, "", "  a <think>b</think>"),
        ("<think>cut of", False, "cut of", ""),
        ("cut off</thi", True, "cut off</thi", ""),
        ("<think></think>", False, "", ""),
        ("<thin", False, "", "<thin"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_told_from_content(text: str, inside: bool, reasoning: str, content: str) -> None:
    parser = ReasoningParser(REASONING_FORMATS["think"], inside=inside)
    assert gather(parse(parser, [text]))[:2] == (content, reasoning)


def test_a_prompt_tells_whether_the_answer_begins_with_reasoning() -> None:
    think = REASONING_FORMATS["think"]
    assert think.begins_inside("<|im_start|>assistant\n<think>\n") and not think.begins_inside("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}...<tool_call>{{ x }}</tool_call>{% endif %}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "mistral_args"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'}}", "deepseek_v3"),
        ("{{ '<｜tool▁calls▁begin｜>'}}{{'<｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>'}}", "deepseek_v31"),
        ("{{ messages }}", None),
    ],
)
def test_the_format_is_chosen_by_the_template(template: str, name: str | None) -> None:
    assert choose_tool_format(template) == name


# ---- however it is cut

PARTS = [
    "<tool_call>", "</tool_call>", "\n", " ", "text", "<", "<tool",
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "f"}', '{"name": "x"}',
    "[TOOL_CALLS]", "[", "]", "f[ARGS]{}", ";", ", ", "<|python_tag|>", "<think>", "</think>", "</th", "é", "世", "\n\n",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=12).map("".join)


def _parsers(name: str, inside: bool) -> list[Callable[[], OutputParser]]:
    think = REASONING_FORMATS["think"]
    return [
        lambda: tool_parser(name),
        lambda: ReasoningParser(think, inside=inside),
        lambda: ChainedParser(ReasoningParser(think, inside=inside), tool_parser(name)),
    ]


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(text=TEXTS, inside=st.booleans())
@settings(max_examples=75)
def test_every_cut_of_a_text_gives_the_same(name: str, text: str, inside: bool) -> None:
    for make in _parsers(name, inside):
        whole = parse(make(), [text])
        assert parse(make(), list(text)) == whole
        for at in range(len(text) + 1):
            assert parse(make(), [text[:at], text[at:]]) == whole


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(text=TEXTS)
@settings(max_examples=150)
def test_no_text_is_lost(name: str, text: str) -> None:
    """Without calls all of it is content; beside calls, only white space and the calls' own text is none."""
    content, _, calls = gather(parse(tool_parser(name), [text]))
    if not calls:
        assert content == text
    else:
        rest = iter(text)
        assert all(char in rest for char in content), "content is in the order of the text"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=5), JSON, max_size=3)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(calls=CALLS, data=st.data())
@settings(max_examples=60)
def test_calls_that_a_grammar_holds_are_given_out_while_they_are_made(
    name: str, calls: list[tuple[str, object]], data: st.DataObject
) -> None:
    kind = TOOL_FORMATS[name]
    written = [(called, json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))) for called, arguments in calls]
    text = canonical(kind, *written)
    whole = parse(HeldToolParser(kind), [text])
    assert gather(whole) == ("", "", written)
    assert parse(HeldToolParser(kind), list(text)) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert parse(HeldToolParser(kind), [text[:cut], text[cut:]]) == whole
    assert gather(parse(HeldToolParser(kind), [text[:cut]]))[2] == gather(parse(HeldToolParser(kind), list(text[:cut])))[2]
    assert found(name, text)[1] == [(called, json.loads(arguments)) for called, arguments in written], "both parsers agree"
