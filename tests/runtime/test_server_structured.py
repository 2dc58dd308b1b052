"""Constrained answers and tool calls through HTTP: the shipped model, the real engine, the unchanged `openai` client."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.runtime.server_process import REAL, ROOT, ServerProcess, running, wait_until

MODEL = ROOT / "examples" / "tiny-model"
QUESTION: list[Any] = [{"role": "user", "content": "What is a list?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "get_time", "strict": True}}

pytestmark = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the tiny model is not here")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ("--drain-delay=0", "--device=cpu", "--num-cache-blocks=256", "--served-model-name=tiny")
    with running(MODEL, *flags, program=REAL) as server:
        yield server


def chat(server: ServerProcess, **fields: Any) -> Any:
    return server.client().chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 300, **fields})


def complete(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    response = server.post("/v1/completions", {"prompt": "The", "max_tokens": 120, **fields})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


# ---- constrained answers


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_bad_words_take_from_what_a_grammar_allows_and_an_answer_to_which_nothing_is_left_is_refused(
    server: ServerProcess, temperature: float
) -> None:
    wanted = {"prompt": "The", "structured_outputs": {"regex": "[0-9]{2}"}, "temperature": temperature, "max_tokens": 9}
    numbers = [*map(str, range(10)), *(f"{i:02}" for i in range(100))]
    assert complete(server, **wanted, bad_words=[number for number in numbers if set(number) != {"7"}])["text"] == "77"
    answer = server.post("/v1/completions", wanted | {"bad_words": numbers})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "structured_outputs.regex")
    assert "bad_words" in answer.json()["error"]["message"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_its_json_schema(server: ServerProcess, strict: bool, temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": strict}}
    choice = chat(server, response_format=wanted, temperature=temperature, seed=3).choices[0]
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    jsonschema.validate(value, PERSON)
    assert list(value) == list(PERSON["properties"]), "properties come in the schema's order"


def test_a_stream_of_a_constrained_answer_is_the_whole(server: ServerProcess) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    whole = chat(server, response_format=wanted, temperature=0).choices[0].message.content
    stream = chat(server, response_format=wanted, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


def test_a_pydantic_model_is_parsed_by_the_client(server: ServerProcess) -> None:
    import pydantic

    class Answer(pydantic.BaseModel):
        yes: bool
        reason: str = pydantic.Field(max_length=8)

    parsed = server.client().chat.completions.parse(model="tiny", messages=QUESTION, response_format=Answer, max_tokens=100, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_json_object_answers_are_objects(server: ServerProcess) -> None:
    content = chat(server, response_format={"type": "json_object"}, temperature=0, max_tokens=60).choices[0].message.content
    assert content.startswith("{")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "regex_schema", "regex_schema": "[a-f]{3,5}-[0-9]{2}"}},
        {"structured_outputs": {"regex": "[a-f]{3,5}-[0-9]{2}"}},
        {"structured_outputs": {"grammar": 'root ::= word "-" [0-9] [0-9]\nword ::= [a-f]{3,5}'}},
    ],
)
def test_an_answer_follows_a_regular_expression_or_a_grammar(server: ServerProcess, fields: dict[str, Any]) -> None:
    choice = complete(server, **fields, temperature=1.0)
    assert re.fullmatch("[a-f]{3,5}-[0-9]{2}", choice["text"]) and choice["finish_reason"] == "stop"


SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-f]{3}"}, "[a-f]{3}"),
        ({"regex": "[a-f]{3}"}, "[a-f]{3}"),
        ({"guided_choice": ["yes", "no"], "guided_regex": None}, "yes|no"),
        ({"guided_grammar": 'root ::= "ab" [0-9]'}, "ab[0-9]"),
        ({"ebnf": 'root ::= "ab" [0-9]'}, "ab[0-9]"),
        ({"guided_json": SCHEMA}, r'\{\s*"a"\s*:\s*1\s*\}'),
        ({"json_schema": json.dumps(SCHEMA)}, r'\{\s*"a"\s*:\s*1\s*\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r'\{\s*"a"\s*:\s*1\s*\}'),
    ],
)
def test_constraints_go_by_the_names_that_clients_of_other_engines_give_them(
    server: ServerProcess, fields: dict[str, Any], pattern: str
) -> None:
    assert re.fullmatch(pattern, complete(server, **fields, temperature=1.0)["text"])


def test_an_answer_is_one_of_the_choices(server: ServerProcess) -> None:
    wanted = {"choice": ["yes", "no", "vielleicht"]}
    texts = {complete(server, structured_outputs=wanted, temperature=2.0, seed=i)["text"] for i in range(8)}
    assert texts <= {"yes", "no", "vielleicht"} and len(texts) > 1


def test_constrained_and_free_choices_run_side_by_side(server: ServerProcess) -> None:
    free = complete(server, temperature=0, max_tokens=40)["text"]
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(complete(server, structured_outputs={"regex": f"[a-f]{{20}}{i}"})["text"]))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    assert complete(server, temperature=0, max_tokens=40)["text"] == free
    for thread in threads:
        thread.join()
    assert all(re.fullmatch("[a-f]{20}[0-5]", text) for text in results) and len(results) == 6


def test_choices_of_one_constrained_request_differ(server: ServerProcess) -> None:
    answer = chat(server, n=3, seed=1, temperature=1.5, extra_body={"structured_outputs": {"regex": "[a-z]{8}"}})
    texts = {choice.message.content for choice in answer.choices}
    assert len(texts) == 3 and all(re.fullmatch("[a-z]{8}", text) for text in texts)


def test_log_probabilities_of_constrained_tokens_are_those_without_the_constraint(server: ServerProcess) -> None:
    free = complete(server, temperature=0, max_tokens=1, logprobs=20)["logprobs"]["top_logprobs"][0]
    bound = complete(server, temperature=0, structured_outputs={"regex": "[0-9]"}, logprobs=20)["logprobs"]
    assert bound["top_logprobs"][0] == pytest.approx(free, abs=1e-3) and bound["token_logprobs"][0] < max(free.values())


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}},
            "response_format.json_schema.schema.type",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": {"minLength": -1}}}}}},
            "response_format.json_schema.schema.properties.a.minLength",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"anyOf": [{}, {"$ref": "#/$defs/x"}]}}}},
            "response_format.json_schema.schema.anyOf[1].$ref",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": {"type": "array", "items": {}, "uniqueItems": True}},
                }
            },
            "response_format.json_schema.schema.uniqueItems",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "["}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= missing"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens"),
        ({"structured_outputs": {"regex": "a"}, "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a", "ebnf": 'root ::= "a"'}, "guided_regex"),
        ({"guided_regex": "(a"}, "structured_outputs.regex"),
        ({"guided_json": "{'a'}"}, "structured_outputs.json"),
    ],
)
def test_a_bad_constraint_is_refused_with_its_place(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = server.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 5, "stream": stream, **fields})
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    "wanted", [{"regex": "[^\\s\\S]"}, {"grammar": 'root ::= root "a"'}, {"regex": "(a"}, {"regex": "(?=a)b"}, {"grammar": "root ::= x"}]
)
def test_the_cause_is_told_without_a_place_in_somebodys_source(server: ServerProcess, wanted: dict[str, str]) -> None:
    """Also of what matches nothing, or needs itself: the library takes it for an empty text."""
    response = server.post("/v1/completions", {"prompt": "a", "structured_outputs": wanted})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, f"structured_outputs.{next(iter(wanted))}")
    assert ".cc" not in error["message"] and ".." not in error["message"]


def test_schemas_that_are_too_deep_or_too_large_are_refused(server: ServerProcess) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    large = {"anyOf": [{"const": i} for i in range(6000)]}
    for schema, message in ((deep, "deeper than 32"), (large, "more than 5000")):
        body = {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        error = server.post("/v1/chat/completions", body).json()["error"]
        assert message in error["message"] and error["param"].startswith("response_format.json_schema.schema."), error


# ---- tools


def test_a_required_call_is_made_in_openais_shape(server: ServerProcess) -> None:
    answer = chat(server, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False, temperature=0)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None and len(choice.message.tool_calls) == 1
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.id.startswith("call_") and call.function.name in ("get_weather", "get_time")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        jsonschema.validate(arguments, WEATHER["function"]["parameters"])


def test_a_named_tool_is_called_and_streams_as_deltas(server: ServerProcess) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    fields: dict[str, Any] = {"tools": [CLOCK, WEATHER], "tool_choice": named, "temperature": 0}
    whole = chat(server, **fields).choices[0].message.tool_calls[0].function
    chunks = list(chat(server, **fields, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "get_weather" and deltas[0].id and deltas[0].index == 0 and deltas[0].function.arguments == ""
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:]) and len(deltas) > 3, "arguments come in pieces"
    assert "".join(delta.function.arguments for delta in deltas) == whole.arguments
    jsonschema.validate(json.loads(whole.arguments), WEATHER["function"]["parameters"])
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_several_calls_may_be_made_at_once(server: ServerProcess) -> None:
    tools = [{"type": "function", "function": {"name": "a"}}, {"type": "function", "function": {"name": "b"}}]
    choices = chat(server, tools=tools, tool_choice="required", temperature=2.0, seed=0, n=4, max_tokens=120).choices
    for choice in choices:
        assert choice.message.tool_calls and choice.finish_reason in ("tool_calls", "length")
        assert all(call.function.name in ("a", "b") for call in choice.message.tool_calls)
    assert max(len(choice.message.tool_calls) for choice in choices) > 1


def test_only_allowed_tools_are_called(server: ServerProcess) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    message = chat(server, tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_time"]


def test_responses_call_tools_and_follow_schemas_too(server: ServerProcess) -> None:
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    called = server.client().responses.create(
        model="tiny", input="Weather?", tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=200
    )
    jsonschema.validate(json.loads(called.output[0].arguments), WEATHER["function"]["parameters"])
    wanted: Any = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    told = server.client().responses.create(model="tiny", input="Who?", text=wanted, max_output_tokens=300)
    jsonschema.validate(json.loads(told.output_text), PERSON)


def test_a_conversation_with_calls_and_results_reaches_the_template(server: ServerProcess) -> None:
    call = chat(server, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, temperature=0).choices[0].message
    messages = [*QUESTION, call, {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": '{"degrees": 3}'}]
    answer = chat(server, messages=messages, max_tokens=8)
    assert answer.usage.prompt_tokens > 20 and answer.choices[0].message.content is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),  # this model's template knows nothing of tools
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER], "tool_choice": "required"}, "tools[1].function.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}], "tool_choice": "required"},
            "tools[0].function.parameters.type",
        ),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "messages[0].tool_calls"),
    ],
)
def test_what_cannot_be_done_with_tools_is_refused_with_its_place(server: ServerProcess, fields: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 5, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"].endswith(param), response.text


def test_tools_that_may_not_be_called_change_nothing(server: ServerProcess) -> None:
    plain = chat(server, temperature=0, max_tokens=12).choices[0].message.content
    assert chat(server, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=12).choices[0].message.content == plain


def test_the_clients_own_error_names_the_parameter(server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}})
    assert caught.value.param == "response_format.json_schema.schema.type"


# ---- at the end, since its compilation would go on for ten seconds


def test_a_grammar_that_takes_for_ever_to_compile_holds_up_nobody_and_its_client_may_leave(server: ServerProcess) -> None:
    body = json.dumps({"messages": QUESTION, "structured_outputs": {"choice": [f"{i}" + "ab" * 1600 for i in range(1024)]}})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
        client.sendall((head + body).encode())
        wait_until(lambda: server.metric("gantline_num_requests_waiting") == 1, what="it waits for its grammar")
        complete(server, max_tokens=4)
        assert server.metric("gantline_num_requests_waiting") == 1, "another was answered meanwhile"
        assert re.fullmatch("[ab]{5}x", complete(server, structured_outputs={"regex": "[ab]{5}x"})["text"])
    wait_until(lambda: server.metric("gantline_num_requests_waiting") == 0, what="nothing waits")
