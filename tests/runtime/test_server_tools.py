"""Calls and reasoning of models that write them freely, through HTTP: a scripted model, the unchanged `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, running

QWEN = (
    "{{ bos_token }}{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}Write <tool_call>.{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>{{ call.function.arguments.city }}</tool_call>{% endfor %}"
    "{% endfor %}<|assistant|>{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
"""As Qwen3's, in short: tools, reasoning that can be switched off, calls of earlier turns."""
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
USER: list[Any] = [{"role": "user", "content": "Weather?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🏔"}}\n</tool_call>'
THOUGHT = "<think>\nThe weather…\n</think>\n\n"


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Asks a model that answers what it is asked to: its echo of the prompt's last message."""
    model = write_model(tmp_path_factory.mktemp("tools") / "echo", template=QWEN, tokens_per_output=7)
    with running(model, "--drain-delay=0") as server:

        def ask(answer: str, **fields: Any) -> Any:
            messages = fields.pop("messages", [{"role": "user", "content": answer}])
            return server.client().chat.completions.create(model="echo", messages=messages, **fields)

        ask.server = server  # type: ignore[attr-defined]
        yield ask


def gathered(stream: Any) -> tuple[str, str, list[list[str]], str | None]:
    """(content, reasoning, [name, arguments] of calls, reason of the end), from the deltas."""
    content, reasoning, reason = "", "", None
    calls: dict[int, list[str]] = {}
    for chunk in stream:
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(calls) and call.type == "function"
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments or ""
    return content, reasoning, list(calls.values()), reason


def whole(answer: Any) -> tuple[str, str, list[list[str]], str | None]:
    message = answer.choices[0].message
    calls = [[call.function.name, call.function.arguments] for call in message.tool_calls or []]
    return message.content or "", getattr(message, "reasoning_content", None) or "", calls, answer.choices[0].finish_reason


@pytest.mark.parametrize(
    ("answer", "content", "reasoning", "calls", "reason"),
    [
        (CALL, "", "", [{"city": "Zürich 🏔"}], "tool_calls"),
        (f"{THOUGHT}Let me see.\n{CALL}\n{CALL}", "Let me see.", "The weather…", [{"city": "Zürich 🏔"}] * 2, "tool_calls"),
        (f"{THOUGHT}No call.", "No call.", "The weather…", [], "stop"),
        (CALL.replace("}}", "}"), CALL.replace("}}", "}"), "", [], "stop"),
        (CALL.replace("get_weather", "rm"), CALL.replace("get_weather", "rm"), "", [], "stop"),
        ("<tool_call>", "<tool_call>", "", [], "stop"),
    ],
)
def test_what_a_model_writes_freely_is_parsed_the_same_in_a_stream(
    ask: Any, answer: str, content: str, reasoning: str, calls: list[Any], reason: str
) -> None:
    got = whole(ask(answer, tools=TOOLS))
    assert got == gathered(ask(answer, tools=TOOLS, stream=True))
    assert (got[0], got[1], got[3]) == (content, reasoning, reason)
    assert [(name, json.loads(arguments)) for name, arguments in got[2]] == [("get_weather", value) for value in calls]


def test_tokens_of_reasoning_are_counted(ask: Any) -> None:
    usage = ask("<think>12345</think>abc").usage
    assert usage.completion_tokens_details.reasoning_tokens == len("<12345</think")
    assert ask("abc").usage.completion_tokens_details.reasoning_tokens == 0


def test_an_answer_that_was_cut_off_tells_so(ask: Any) -> None:
    content, _, calls, reason = whole(ask(CALL, tools=TOOLS, max_tokens=20))
    assert (content, calls, reason) == (CALL[:20], [], "length")


def test_without_tools_nothing_is_taken_for_a_call(ask: Any) -> None:
    assert whole(ask(CALL)) == (CALL, "", [], "stop")
    assert whole(ask(CALL, tools=TOOLS, tool_choice="none")) == (CALL, "", [], "stop")


def test_the_template_gets_tools_calls_results_and_reasoning(ask: Any) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    messages = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3 degrees"},
    ]
    server: ServerProcess = ask.server
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert "<think>Hm.</think><tool_call>Bern</tool_call>" in text and "3 degrees" in text
    with_tools = ask("", messages=messages, tools=TOOLS, max_tokens=1).usage.prompt_tokens
    assert with_tools > len(tokens) + 50
    function["arguments"] = '{"city": "Be'
    error = server.post("/v1/chat/completions", {"messages": messages}).json()["error"]
    assert error["param"] == "messages[1].tool_calls" and "the arguments of a call are no JSON text" in error["message"]


@pytest.mark.parametrize(
    "thought", [{"reasoning": "Hm."}, {"reasoning": "Hm.", "reasoning_content": None}, {"reasoning": "Hm.", "reasoning_content": "Hm."}]
)
def test_reasoning_comes_back_by_either_name(ask: Any, thought: dict[str, Any]) -> None:
    told = [ask("", messages=_thinking(said)).usage.prompt_tokens for said in (thought, {"reasoning_content": "Hm."}, {})]
    assert told[0] == told[1] > told[2]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "reasoning": "Hm.", "reasoning_content": "Ha."}, "differ"),
        ({"role": "user", "reasoning": "Hm."}, "role assistant"),
    ],
)
def test_reasoning_of_two_minds_or_of_others_is_refused_with_its_place(ask: Any, message: dict[str, Any], words: str) -> None:
    messages = [*USER, {"content": "x", **message}]
    refused = ask.server.post("/v1/chat/completions", {"model": "echo", "messages": messages})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == "messages[1].reasoning" and words in error["message"]


def _thinking(said: dict[str, Any]) -> list[dict[str, Any]]:
    return [*USER, {"role": "assistant", "content": "Cold.", **said}, *USER]


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("low", True)])
def test_an_effort_switches_thinking(ask: Any, effort: str, thinks: bool) -> None:
    prompts = {thinking: ask("x", extra_body={"chat_template_kwargs": {"enable_thinking": thinking}}) for thinking in (True, False)}
    assert ask("x", reasoning_effort=effort).usage.prompt_tokens == prompts[thinks].usage.prompt_tokens
    assert prompts[False].usage.prompt_tokens > prompts[True].usage.prompt_tokens


def test_the_parsers_can_be_chosen(tmp_path: Path) -> None:
    model = write_model(tmp_path / "echo", template=QWEN)
    with running(model, "--drain-delay=0", "--tool-call-parser=mistral", "--reasoning-parser=none") as server:
        answer = '<think>a</think>[TOOL_CALLS][{"name": "get_weather", "arguments": {}}]'
        got = server.client().chat.completions.create(model="echo", messages=[{"role": "user", "content": answer}], tools=TOOLS)
        assert whole(got) == ("<think>a</think>", "", [["get_weather", "{}"]], "tool_calls")
        assert len(got.choices[0].message.tool_calls[0].id) == 9
