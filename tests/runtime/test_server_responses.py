"""/v1/responses, asked by the unchanged `openai` client: items in, items and typed events out, nothing stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_type_hints

import openai
import pydantic
import pytest
from gantline_runtime.server import parameters
from gantline_runtime.server.errors import ApiError, translate_validation
from gantline_runtime.server.protocol_responses import ResponsesRequest
from gantline_runtime.server.response_items import ResponseItems
from openai.types.responses import Response, ResponseStreamEvent, response_create_params

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, events, running
from tests.runtime.test_server_tools import CALL, QWEN, THOUGHT

TOOL = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("responses") / "echo", session_len=3000)
    with running(model, "--drain-delay=0") as server:
        yield server


def _valid(adapter: pydantic.TypeAdapter[Any], body: dict[str, Any]) -> Any:
    """`body` as the client's own types have it. They know a count of tokens that OpenAI bills for writing to its cache."""
    usage = (body.get("response") or body).get("usage")
    if usage:
        usage["input_tokens_details"] = {"cache_write_tokens": 0, **usage["input_tokens_details"]}
    return adapter.validate_python(body)


EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
WHOLE: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(Response)


def test_a_text_is_answered(server: ServerProcess) -> None:
    answer = server.client().responses.create(model="echo", input="héllo 😀", metadata={"a": "b"}, max_output_tokens=50)
    assert answer.output_text == "héllo 😀" and answer.status == "completed" and answer.id.startswith("resp")
    assert answer.metadata == {"a": "b"} and answer.max_output_tokens == 50 and answer.store is False  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.input_tokens == 3 + len("héllo 😀".encode())
    assert answer.usage.output_tokens == len("héllo 😀".encode()) + 1 and answer.usage.input_tokens_details.cached_tokens == 0
    _valid(WHOLE, server.post("/v1/responses", {"input": "a"}).json())


def test_a_stream_tells_of_the_same_answer_by_typed_events(server: ServerProcess) -> None:
    with server.client().responses.stream(model="echo", input="aé世") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "aé世"
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    text = server.post("/v1/responses", {"input": "aé世", "stream": True}).text
    assert "[DONE]" not in text
    told = events(text)
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert [event["type"] for event in told] == names and [event["sequence_number"] for event in told] == list(range(len(told)))
    for event in told:
        _valid(EVENT, event)
    whole = server.post("/v1/responses", {"input": "aé世"}).json()
    assert _without_names(told[-1]["response"]) == _without_names(whole)


def _without_names(response: dict[str, Any]) -> dict[str, Any]:
    ids = {"id", "created_at", "completed_at", "usage"}
    kept = {key: value for key, value in response.items() if key not in ids}
    return {**kept, "output": [{key: value for key, value in item.items() if key != "id"} for item in response["output"]]}


def test_an_answer_that_was_cut_off_is_incomplete(server: ServerProcess) -> None:
    answer = server.client().responses.create(model="echo", input="abcdef", max_output_tokens=3)
    assert answer.status == "incomplete" and answer.output_text == "abc" and answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    told = events(server.post("/v1/responses", {"input": "abcdef", "max_output_tokens": 3, "stream": True}).text)
    assert told[-1]["type"] == "response.incomplete"


def test_instructions_and_earlier_items_become_the_prompt(server: ServerProcess) -> None:
    client = server.client()
    first = client.responses.create(model="echo", input="one")
    items: list[Any] = [
        {"role": "user", "content": "one"},
        *first.output,
        {"role": "user", "content": [{"type": "input_text", "text": "two"}]},
    ]
    second = client.responses.create(model="echo", instructions="Be brief.", input=items)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
    ]
    assert second.output_text == "two" and second.usage is not None
    assert second.usage.input_tokens == server.post("/tokenize", {"messages": messages}).json()["count"]


def test_log_probabilities_come_with_the_text(server: ServerProcess) -> None:
    body: dict[str, Any] = {"input": "ab", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = server.post("/v1/responses", body).json()["output"][0]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b"] and len(part["logprobs"][0]["top_logprobs"]) == 2
    told = events(server.post("/v1/responses", {**body, "stream": True}).text)
    streamed = [entry for event in told if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert streamed == part["logprobs"]


def test_extras_reach_the_engine(server: ServerProcess) -> None:
    answer = server.client().responses.create(model="echo", input="one STOP", extra_body={"stop": ["STOP"], "ignore_eos": True})
    assert answer.output_text == "one "


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"store": True}, "unsupported_parameter", "store"),
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "c"}, "unsupported_parameter", "conversation"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"max_tool_calls": 1}, "unsupported_parameter", "max_tool_calls"),
        ({"include": ["file_search_call.results"]}, "unsupported_parameter", "include[0]"),
        ({"reasoning": {"summary": "detailed"}}, "unsupported_parameter", "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "unsupported_parameter", "text.verbosity"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_parameter", "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_parameter", "input[0].content[0]"),
        ({"input": [{"type": "computer_call"}]}, "unsupported_parameter", "input[0]"),
        ({"input": [{"role": "user"}]}, "invalid_value", "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "invalid_value", "input[0].arguments"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": None}, "missing_parameter", "input"),
        ({"input": 5}, "invalid_value", "input"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
        ({"max_tokens": 5}, "unsupported_parameter", "max_tokens"),
        ({"surprise": 1}, "unknown_parameter", "surprise"),
        ({"input": "a" * 4000}, "context_length_exceeded", "input"),
        ({"max_output_tokens": 3000}, "context_length_exceeded", "input"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server: ServerProcess, change: dict[str, Any], code: str, param: str) -> None:
    response = server.post("/v1/responses", {"input": "a", **change})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param), error


def test_every_parameter_of_the_openai_client_is_supported_harmless_or_refused_by_name() -> None:
    known = {
        key
        for base in vars(response_create_params).values()
        if isinstance(base, type) and base.__name__.startswith("ResponseCreateParams")
        for key in get_type_hints(base)
    }
    assert len(known) > 25
    assert known <= ResponsesRequest.model_fields.keys() | set(parameters.HARMLESS) | parameters.UNSUPPORTED_RESPONSES.keys()


def test_a_failed_answer_ends_its_stream_with_a_failed_response(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = write_model(tmp_path_factory.mktemp("failing") / "echo", endless=True, fail_at="step")
    with running(model, "--drain-delay=0") as server:
        told = events(server.post("/v1/responses", {"input": "abcdefghijklmnop", "stream": True, "max_output_tokens": 500}).text)
    assert told[-1]["type"] == "response.failed" and told[-1]["response"]["error"]["code"] == "engine_dead"
    assert told[-1]["response"]["status"] == "failed"


def test_the_clients_own_exceptions_are_raised(server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().responses.create(model="echo", input="a", previous_response_id="resp_1")
    assert caught.value.code == "unsupported_parameter" and "earlier items" in str(caught.value)


# ---- tools and reasoning, as the chat's own tests have them


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("thinking") / "echo", template=QWEN, tokens_per_output=5)
    with running(model, "--drain-delay=0") as server:
        yield server


WEATHER: list[Any] = [{"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}]


def test_thoughts_text_and_calls_are_items_and_come_back_as_input(thinking: ServerProcess) -> None:
    client = thinking.client()
    answer = client.responses.create(model="echo", input=f"{THOUGHT}Let me see.\n{CALL}", tools=WEATHER)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    thought, said, call = answer.output
    assert thought.content[0].text == "The weather…" and said.content[0].text == "Let me see."  # type: ignore[union-attr,index]
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Zürich 🏔"}  # type: ignore[union-attr]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"}  # type: ignore[union-attr]
    items: list[Any] = [{"role": "user", "content": "Weather?"}, *answer.output, result, {"role": "user", "content": "So?"}]
    again = client.responses.create(model="echo", input=items, tools=WEATHER)
    shorter = client.responses.create(model="echo", input=[items[0], items[-1]], tools=WEATHER)
    assert again.output_text == shorter.output_text == "So?" and again.usage is not None and shorter.usage is not None
    assert again.usage.input_tokens > shorter.usage.input_tokens + len("The weather…Let me see.3 degrees")


def test_what_agents_ask_for_to_keep_reasoning_without_storage_is_given_by_the_items_as_they_are(thinking: ServerProcess) -> None:
    client = thinking.client()
    settings: dict[str, Any] = {"store": False, "include": ["reasoning.encrypted_content"], "reasoning": {"summary": "auto"}}
    with client.responses.stream(model="echo", input=f"{THOUGHT}Said.", **settings) as stream:
        told = list(stream)
        final = stream.get_final_response()
    thoughts = [event.delta for event in told if event.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "The weather…" and [item.type for item in final.output] == ["reasoning", "message"]
    logprobs = final.output[1].content[0].logprobs  # type: ignore[union-attr,index]
    assert not logprobs, "nobody asked for them"

    def num_input_tokens(thought: dict[str, Any]) -> int:
        items: list[Any] = [{"role": "user", "content": "a"}, {"type": "reasoning", "id": "rs_1", **thought}, final.output[1]]
        usage = client.responses.create(model="echo", input=[*items, {"role": "user", "content": "b"}], **settings).usage
        assert usage is not None
        return usage.input_tokens

    text, none = {"text": "The weather"}, num_input_tokens({"summary": [], "content": None})
    assert num_input_tokens({"summary": [], "content": [{"type": "reasoning_text", **text}]}) >= none + len("The weather")
    assert num_input_tokens({"summary": [{"type": "summary_text", **text}]}) >= none + len("The weather"), "as others summarize it"


@pytest.mark.parametrize("answer", [CALL, f"{CALL}\n{CALL}", f"{THOUGHT}Let me see.\n{CALL}", f"{THOUGHT}No call.", "plain"])
def test_a_stream_with_tools_tells_of_the_same_items(thinking: ServerProcess, answer: str) -> None:
    body = {"input": answer, "tools": WEATHER, "include": ["message.output_text.logprobs"]}
    whole = thinking.post("/v1/responses", body).json()
    told = events(thinking.post("/v1/responses", {**body, "stream": True}).text)
    for event in told:
        _valid(EVENT, event)

    def named(response: dict[str, Any]) -> dict[str, Any]:
        kept = _without_names(response)
        return {**kept, "output": [{key: value for key, value in item.items() if key != "call_id"} for item in kept["output"]]}

    assert named(told[-1]["response"]) == named(whole)
    calls = [item for item in whole["output"] if item["type"] == "function_call"]
    assert len(calls) == answer.count("<tool_call>") and all(json.loads(call["arguments"]) for call in calls)
    pieces: dict[str, str] = {}
    for event in told:
        if event["type"].endswith(".delta"):
            pieces[event["item_id"]] = pieces.get(event["item_id"], "") + event["delta"]
    ends = {event["item"]["id"]: event["item"] for event in told if event["type"] == "response.output_item.done"}
    assert pieces == {name: item.get("arguments") or item["content"][0]["text"] for name, item in ends.items()}


def test_a_bad_schema_is_named_as_this_endpoint_has_it(thinking: ServerProcess) -> None:
    for body, param in (
        ({"tools": [{**WEATHER[0], "parameters": {"type": "string"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}}}}, "text.format"),
    ):
        error = thinking.post("/v1/responses", {"input": "a", **body}).json()["error"]
        assert error["param"].startswith(param), error


# ---- what a chat's chunks become


def _chat_of(**body: Any) -> dict[str, Any]:
    return ResponsesRequest.model_validate_json(json.dumps({"input": "a", **body})).for_chat()


def test_tools_formats_and_efforts_are_those_of_a_chat() -> None:
    chat = _chat_of(
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        reasoning={"effort": "low"},
    )
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}} and chat["parallel_tool_calls"] is False
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": schema} and chat["reasoning_effort"] == "low"
    allowed = _chat_of(
        tools=[TOOL], tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    )
    chosen = {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert allowed["tool_choice"] == {"type": "allowed_tools", "allowed_tools": chosen}
    assert not {"tools", "tool_choice", "response_format"} & _chat_of().keys()


def test_what_an_assistant_thought_said_and_called_in_one_turn_is_one_message() -> None:
    items = [
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "m",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "x", "annotations": []}],
        },
        {"type": "function_call", "id": "fc", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
    ]
    calls = [{"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in (1, 2)]
    assert _chat_of(input=items)["messages"] == [
        {"role": "assistant", "reasoning_content": "hm", "content": [{"type": "text", "text": "x"}], "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}]},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "2"}]},
    ]


def test_reasoning_text_and_calls_become_items_in_their_order() -> None:
    whole = WHOLE.dump_python(_valid(WHOLE, _frame()))
    items = ResponseItems(_frame())
    assert whole["output"] == []
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "let "},
        {"reasoning_content": "me"},
        {"content": "ok"},
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"index": 1, "id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
    ]
    usage = {"input_tokens": 1, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 1, "total_tokens": 2}
    usage["output_tokens_details"] = {"reasoning_tokens": 0}
    told = [*items.begin(), *(event for delta in deltas for event in items.take(delta, [])), *items.end("tool_calls", usage)]
    for event in told:
        _valid(EVENT, event)
    output = items.response["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"][0]["text"] == "let me" and output[1]["content"][0]["text"] == "ok"
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output[2:]] == [("c1", "f", '{"a": 1}'), ("c2", "g", "{}")]
    assert all(item["status"] == "completed" for item in output)
    opened = [event["item"]["id"] for event in told if event["type"] == "response.output_item.added"]
    closed = [event["item"]["id"] for event in told if event["type"] == "response.output_item.done"]
    assert opened == closed == [item["id"] for item in output]


def _frame() -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "output": [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "status": "in_progress",
    }


def test_an_error_in_a_converted_chat_is_told_by_the_names_of_this_endpoint() -> None:
    from gantline_runtime.server.response_form import renamed

    assert renamed(ApiError(400, "x", param="response_format.json_schema.schema.a")).param == "text.format.schema.a"
    assert renamed(ApiError(400, "x", param="tools[1].function.parameters.type")).param == "tools[1].parameters.type"
    assert renamed(ApiError(400, "x", param="messages[3].content")).param == "input"
    assert renamed(ApiError(400, "x", param="tools[0]")).param == "tools[0]" and renamed(ApiError(400, "x")).param is None


def test_a_body_that_is_no_object_is_an_error_like_any_other() -> None:
    for body in ("[]", "null", '"x"', "5"):
        with pytest.raises(pydantic.ValidationError) as caught:
            ResponsesRequest.model_validate_json(body)
        assert translate_validation(caught.value).status == 400
