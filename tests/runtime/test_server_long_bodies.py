"""Long bodies are read in a process of their own: nobody else waits for them, and what they say, or get wrong, is the same."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gantline_runtime.server.body_reader import is_long

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, running, wait_until
from tests.runtime.test_server_tools import QWEN

HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("long") / "echo", template=QWEN, session_len=1 << 17, num_cache_blocks=4096)
    with running(model, "--drain-delay=0") as server:
        yield server


def _encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def _filled(body: dict[str, Any]) -> bytes:
    """Made long by what asks for nothing."""
    return _encoded({**body, "metadata": {str(i): [i] for i in range(20_000)}})


def post(server: ServerProcess, path: str, body: bytes) -> httpx.Response:
    return server.send("POST", path, content=body, headers=HEADERS)


def reading_process(server: ServerProcess) -> int:
    """The one child that reads bodies."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"server.body_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    fields = Path(f"/proc/{pid}/task/{thread or pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_many_values_make_a_body_long_and_source_code_in_a_text_does_not() -> None:
    code = 'def f(a, b={}):\n    return {"a": [a, {"b": b}]}\n' * 15_000
    parts = [{"type": "text", "text": "a"}] * 2000
    short = (
        {"messages": [{"role": "user", "content": code}]},
        {"prompt": list(range(30_000))},
        {"messages": [{"role": "user", "content": parts[:500]}]},
    )
    long = ({"messages": [{"role": "user", "content": parts}]}, {"prompt": list(range(60_000))}, {"prompt": "a" * (1 << 20)})
    assert [is_long(_encoded(body)) for body in short + long] == [False] * 3 + [True] * 3


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
WRONG = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "texts"}}}}}
LARGE = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"maximum": 10**30}}}}}
SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
ASKED = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": [65, 66] * 50, "max_tokens": 4}),
    ("/v1/completions", {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 2, "logprobs": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "é😀"}]}], "tools": [TOOL]}),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [TOOL], "tool_choice": "none", "max_tokens": 4}),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [TOOL], "tool_choice": "required", "max_tokens": 9}),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [TOOL, TOOL]}),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [WRONG]}),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
    ("/v1/chat/completions", {"messages": ASKED, "tools": [LARGE]}),
    ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 4, "response_format": {"type": "json_object"}, "min_tokens": 1}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "structured_outputs": {"json": {"type": 5}}}),
    ("/generate", {"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": "a"}, "min_tokens": 1}),
    ("/v1/responses", {"input": ASKED, "tools": [{"type": "function", "name": "f"}]}),
    ("/v1/responses", {"input": ASKED, "tools": [{"type": "function", **TOOL["function"]}], "text": {"format": SCHEMA}}),
    ("/v1/responses", {"input": ASKED, "tools": [{"type": "function", **WRONG["function"]}]}),
    ("/v1/responses", {"input": ASKED, "text": {"format": {**SCHEMA, "schema": {"type": 5}}}}),
    ("/v1/embeddings", {"input": [[65, 66], [67]]}),
    ("/v1/completions", {"prompt": [65, -1]}),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}, {"role": "tester", "content": "b"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2, "zzz": 1}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_long_body_means_what_a_short_one_does(server: ServerProcess, path: str, body: dict[str, Any]) -> None:
    if path == "/v1/responses":
        long = _encoded(body) + b" " * (2 << 20)
    else:
        long = _filled(body)
    assert is_long(long) and not is_long(_encoded(body))
    answers = [post(server, path, data).json() for data in (_encoded(body), long)]
    for answer in answers:
        for name in ("id", "created", "created_at", "completed_at"):
            answer.pop(name, None)
        for item in answer.get("output", ()):
            item.pop("id")
        answer.get("usage", {}).pop("prompt_tokens_details", None)
        answer.get("usage", {}).pop("input_tokens_details", None)
    assert answers[0] == answers[1]


def test_tools_and_schemas_of_megabytes_do_not_hold_the_event_loop(server: ServerProcess) -> None:
    """They are judged and written down for the template and the grammar where they are read; here nothing is left of them but text."""
    schema = {"type": "object", "properties": {f"property_{i}": {"type": "string", "description": "what it is"} for i in range(1200)}}
    tools = [{"name": f"f{i}", "parameters": schema} for i in range(50)]
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "$defs": {"x": {"enum": [[]] * 600_000}}}}}
    chat = {"messages": ASKED, "tools": [{"type": "function", "function": tool} for tool in tools]}
    bodies = [
        ("/v1/chat/completions", chat, "context_length_exceeded"),
        ("/v1/responses", {"input": ASKED, "tools": [{"type": "function", **tool} for tool in tools]}, "context_length_exceeded"),
        ("/v1/chat/completions", {"messages": ASKED, "response_format": format, "min_tokens": 1}, "invalid_value"),
    ]
    assert post(server, "/v1/completions", b'{"prompt": "a", "max_tokens": 1}' + b" " * (2 << 20)).status_code == 200
    reader = reading_process(server)
    began = cpu_seconds(server.process.pid), cpu_seconds(reader)
    for path, body, code in bodies * 2:
        assert post(server, path, _encoded(body)).json()["error"]["code"] == code
    ours, others = cpu_seconds(server.process.pid) - began[0], cpu_seconds(reader) - began[1]
    assert ours < others / 4, f"{ours:.2f} s in the event loop's thread, {others:.2f} s in the other process"


def test_what_is_no_json_is_told_so(server: ServerProcess) -> None:
    answer = post(server, "/v1/completions", b'{"prompt": "a", ' + b" " * (2 << 20))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"


def test_bodies_of_millions_of_values_do_not_hold_the_event_loop(server: ServerProcess) -> None:
    """Read here, each would take the thread of the event loop as long as it takes the other process."""
    lists = json.dumps({"prompt": "a", "zzz": [1] * 4_000_000}, separators=(",", ":")).encode()
    tools = [
        {**TOOL, "function": {"name": f"f{i}", "parameters": {"type": "object", "properties": {"a": {}}}, "zzz": 1}} for i in range(128)
    ]
    values = _encoded({"messages": [{"role": "user", "content": "a"}], "tools": tools, "metadata": [[], {}, "a"] * 300_000})
    post(server, "/v1/completions", lists)  # the process is started by now
    reader = reading_process(server)
    began = cpu_seconds(server.process.pid), cpu_seconds(reader)
    for path, body in (("/v1/completions", lists), ("/v1/chat/completions", values)) * 3:
        answer = post(server, path, body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_parameter"
    ours, others = cpu_seconds(server.process.pid) - began[0], cpu_seconds(reader) - began[1]
    assert ours < others / 3, f"{ours:.2f} s in the event loop's thread, {others:.2f} s in the other process"


def test_contents_of_too_many_parts_are_refused(server: ServerProcess) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}] * 4096}
    for path, name in (("/v1/chat/completions", "messages"), ("/tokenize", "messages"), ("/v1/responses", "input")):
        error = post(server, path, _encoded({name: [message] * 5})).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", name), error


def test_a_reading_process_that_is_killed_costs_one_answer_and_is_replaced(server: ServerProcess) -> None:
    body = _filled({"prompt": "ab", "max_tokens": 1})
    assert post(server, "/v1/completions", body).status_code == 200
    killed = reading_process(server)
    os.kill(killed, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, server.url + "/v1/completions", content=body, headers=HEADERS, timeout=60)
        assert server.post("/v1/completions", {"prompt": "ab", "max_tokens": 1}).status_code == 200, "short ones do not wait for it"
        wait_until(lambda: len(Path(f"/proc/{killed}/fdinfo/0").read_text()) > 0 and not answer.done(), what="it waits")
        os.kill(killed, signal.SIGKILL)
        assert answer.result(60).status_code in (200, 500)
    assert post(server, "/v1/completions", body).status_code == 200
    assert reading_process(server) != killed


def test_a_pattern_of_open_brackets_takes_no_minute(server: ServerProcess) -> None:
    """Of 30 KB; while it was rewritten nothing else ran."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "[" * 30_000}}}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }
    before = process_cpu_seconds(server.process.pid)
    server.post("/v1/chat/completions", body)
    assert process_cpu_seconds(server.process.pid) - before < 3


def process_cpu_seconds(pid: int) -> float:
    return sum(cpu_seconds(pid, int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir())


def test_arguments_of_an_earlier_call_that_are_nested_too_deeply_are_refused(server: ServerProcess) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}"}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "a"}]
    answer = server.post("/v1/chat/completions", {"messages": messages})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[0].tool_calls", answer.text


def test_many_scores_are_told_as_few_are(server: ServerProcess) -> None:
    """They are written in pieces, in another thread."""

    def told(length: int, **fields: Any) -> Any:
        return server.post("/v1/completions", {"prompt": "ab" * (length // 2), "max_tokens": 1, "temperature": 0, **fields}).json()[
            "choices"
        ][0]

    few, many = told(3000, prompt_logprobs=2)["prompt_logprobs"], told(6000, prompt_logprobs=2)["prompt_logprobs"]
    assert (
        len(many) == 6001
        and many[0] is None
        and many[:3000] == few[:3000]
        and next(iter(many[1].values())).keys() == {"logprob", "rank", "decoded_token"}
    )
    echoed = [told(length, echo=True, logprobs=2)["logprobs"] for length in (3000, 6000)]
    assert all(len(column) == 6002 and column[:3000] == echoed[0][name][:3000] for name, column in echoed[1].items())
