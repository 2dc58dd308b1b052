"""The endpoints, asked by the unchanged `openai` client and by clients that get things wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gantline_runtime.server.routes import ROUTES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, events, read_metric, running, wait_until

MANY = "x" * 2000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("api") / "echo", session_len=3000)
    with running(model, "--drain-delay=0", "--max-body-bytes=65536") as server:
        yield server


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One token every 20 ms, two requests at once, one waiting."""
    model = write_model(tmp_path_factory.mktemp("slow") / "slow", step_seconds=0.02, endless=True)
    with running(model, "--drain-delay=0", "--drain-timeout=1", "--max-batch-size=2", "--max-waiting=1") as server:
        yield server


def _user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# ---- what works


def test_a_chat_is_answered(server: ServerProcess) -> None:
    answer = server.client().chat.completions.create(model="echo", messages=_user("Grüße, 世界 😀"))
    assert answer.choices[0].message.content == "Grüße, 世界 😀" and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop" and answer.model == "echo" and answer.id.startswith("chatcmpl-")
    assert answer.usage is not None and answer.usage.prompt_tokens == 3 + len("Grüße, 世界 😀".encode())
    assert answer.usage.completion_tokens == len("Grüße, 世界 😀".encode()) + 1
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_chat_streams_whole_characters_and_ends_with_its_usage(server: ServerProcess) -> None:
    stream = server.client().chat.completions.create(
        model="echo", messages=_user("é世😀!"), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "é世😀!"
    assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 11
    assert all(c.usage is None for c in chunks[:-1])


def test_a_stream_tells_of_its_usage_so_far_in_each_event_if_asked(server: ServerProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    told = events(server.post("/v1/completions", {"prompt": "abc", "stream": True, "stream_options": options}).text)
    counts = [event["usage"]["completion_tokens"] for event in told]
    assert counts == sorted(counts) and counts[-1] == 4 and all(event["usage"]["prompt_tokens"] == 4 for event in told)


def test_a_stream_ends_with_done(server: ServerProcess) -> None:
    text = server.post("/v1/chat/completions", {"messages": _user("hi"), "stream": True}).text
    assert text.endswith("data: [DONE]\n\n") and text.count("[DONE]") == 1


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_number_of_tokens_is_bounded(server: ServerProcess, field: str) -> None:
    body = {"messages": _user("abcdef"), field: 3}
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "length")


def test_a_completion_is_answered_for_each_prompt_and_choice(server: ServerProcess) -> None:
    answer = server.client().completions.create(model="echo", prompt=["ab", "cd"], n=2, echo=True, max_tokens=4)
    assert [choice.text for choice in answer.choices] == ["abab", "abab", "cdcd", "cdcd"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)


def test_a_completion_streams_each_choice(server: ServerProcess) -> None:
    texts: dict[int, str] = {}
    for chunk in server.client().completions.create(model="echo", prompt=["ab", "cde"], stream=True, echo=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "abab", 1: "cdecde"}


def test_without_a_limit_a_completion_has_sixteen_tokens(server: ServerProcess) -> None:
    assert server.client().completions.create(model="echo", prompt="abcdefghijklmnopqrstuvwxyz").choices[0].text == "abcdefghijklmnop"


def test_several_choices_of_a_chat_stream_side_by_side(server: ServerProcess) -> None:
    texts: dict[int, str] = {}
    for chunk in server.client().chat.completions.create(model="echo", messages=_user("hello"), n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == {0: "hello", 1: "hello", 2: "hello"}


def test_chat_logprobs_name_each_token_and_its_rivals(server: ServerProcess) -> None:
    answer = server.client().chat.completions.create(model="echo", messages=_user("aé"), logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["a", "\ufffd", "\ufffd"]
    assert bytes(byte for entry in logprobs.content for byte in entry.bytes or []).decode() == "aé"
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2, 2] and logprobs.content[0].logprob == -0.25


def test_completion_logprobs_count_characters(server: ServerProcess) -> None:
    logprobs = server.client().completions.create(model="echo", prompt="abc", logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset, logprobs.token_logprobs) == (["a", "b", "c"], [0, 1, 2], [-0.25] * 3)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(server: ServerProcess) -> None:
    body: dict[str, Any] = {"messages": _user("one. STOP two"), "stop": ["STOP", "never"]}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == ("one. ", "stop")
    stream = server.client().chat.completions.create(model="echo", stream=True, **body)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == "one. "


def test_what_was_sampled_after_a_stop_string_is_neither_counted_nor_cached(tmp_path: Path) -> None:
    """The engine is a hundred tokens past it when the server finds it."""
    answer = b"one. STOP" + b"z" * 100
    model = write_model(tmp_path / "late", answer=list(answer), tokens_per_output=len(answer), endless=True)
    with running(model, "--drain-delay=0") as server:
        before = server.metric("gantline_generation_tokens_total")
        first = server.post("/v1/completions", {"prompt": "q" * 60, "stop": "STOP", "max_tokens": 4000}).json()
        assert (first["choices"][0]["text"], first["usage"]["completion_tokens"]) == ("one. ", 9)
        assert server.metric("gantline_generation_tokens_total") - before == 9
        again = server.post("/v1/completions", {"prompt": "q" * 60 + answer.decode(), "max_tokens": 1}).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 64


def test_extras_reach_the_engine(server: ServerProcess) -> None:
    extra = {"min_tokens": 7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [0], "skip_special_tokens": False}
    answer = server.client().chat.completions.create(model="echo", messages=_user("abc"), max_tokens=9, extra_body=extra)
    assert answer.choices[0].message.content == "abcabca"
    biased = server.client().chat.completions.create(model="echo", messages=_user("abc"), max_tokens=2, logit_bias={"5": 100})
    assert biased.choices[0].message.content == server.post("/detokenize", {"tokens": [5, 5]}).json()["prompt"]
    endless = server.post("/v1/completions", {"prompt": "ab", "ignore_eos": True, "max_tokens": 6}).json()
    assert endless["choices"][0]["text"] == "ababab"


def test_variables_reach_the_chat_template(server: ServerProcess) -> None:
    answer = server.post("/tokenize", {"messages": _user("a"), "chat_template_kwargs": {"suffix": "zz"}}).json()
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json()["prompt"] == "<|begin|><|user|>a<|assistant|>zz"


def test_a_cached_prompt_is_told_in_the_usage(server: ServerProcess) -> None:
    for cached in (0, 192):
        usage = server.post("/v1/completions", {"prompt": "0123456789" * 20, "max_tokens": 1}).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached


def test_what_asks_for_nothing_is_accepted_from_any_model(server: ServerProcess) -> None:
    body = {"messages": _user("a"), "verbosity": "medium", "reasoning_effort": "none", "store": False, "service_tier": "auto"}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_lmdeploys_client_is_answered_though_it_sends_what_nobody_asked_for(server: ServerProcess) -> None:
    """The bodies of its `APIClient`, whose methods send all of their local variables."""
    shared: dict[str, Any] = {"model": "echo", "temperature": 0.7, "top_p": 1.0, "n": 1, "stop": None, "stream": False, "user": None}
    shared |= {"repetition_penalty": 1.0, "session_id": -1, "ignore_eos": False, "kwargs": {}}
    chat = {**shared, "messages": _user("abc"), "max_tokens": 512, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_logprobs": 0}
    assert server.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"] == "abc"
    completion = {**shared, "prompt": "abc", "suffix": None, "max_tokens": 16, "top_k": 40}
    assert server.post("/v1/completions", completion).json()["choices"][0]["text"] == "abc"
    _assert_error(server.post("/v1/completions", {**completion, "kwargs": {"a": 1}}), 400, "unsupported_parameter", "kwargs")


def test_models_are_listed(server: ServerProcess) -> None:
    assert [model.id for model in server.client().models.list()] == ["echo"]
    assert server.client().models.retrieve("echo").owned_by == "gantline"


def test_text_becomes_tokens_and_back(server: ServerProcess) -> None:
    neutral = {"add_generation_prompt": True, "continue_final_message": False, "return_token_strs": False, "tools": [], "user": "u"}
    assert server.post("/tokenize", {"messages": _user("a"), **neutral}).json() == server.post("/tokenize", {"messages": _user("a")}).json()
    answer = server.post("/tokenize", {"prompt": "aé"}).json()
    assert answer["count"] == 4 and answer["tokens"][0] == 256 and answer["max_model_len"] == 3000
    plain = server.post("/tokenize", {"prompt": "aé", "add_special_tokens": False}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": plain}).json() == {"prompt": "aé"}


def test_version_and_health_and_readiness_answer(server: ServerProcess) -> None:
    assert set(server.get("/version").json()) == {"version"}
    assert server.get("/health").json() == {"state": "ready"} == server.get("/ready").json()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=40),
    stop=st.lists(st.text(alphabet="abé ", min_size=1, max_size=3), max_size=2),
    limit=st.integers(1, 60),
)
def test_streamed_text_equals_the_whole_text(server: ServerProcess, text: str, stop: list[str], limit: int) -> None:
    body = {"messages": _user(text), "stop": stop, "max_tokens": limit, "logprobs": True}
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]
    found = events(server.post("/v1/chat/completions", {**body, "stream": True}).text)
    choices = [event["choices"][0] for event in found]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"]


# ---- what goes wrong


def _assert_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and error["param"] == param and error["message"]
    assert error["type"] in ("invalid_request_error", "rate_limit_error", "server_error")
    return error  # type: ignore[no-any-return]


POSTS = [route.path for route in ROUTES if route.method == "POST"]


@pytest.mark.parametrize("path", POSTS)
def test_every_route_that_takes_a_body_answers_bad_ones_in_one_shape(server: ServerProcess, path: str) -> None:
    as_json = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"\xff\xfe", b"[" * 50_000):
        _assert_error(server.send("POST", path, content=body, headers=as_json), 400, "invalid_json")
    _assert_error(server.post(path, {"surprise": 1}), 400, *_first_problem(path))
    _assert_error(server.send("POST", path, content=b"{}", headers={"Content-Type": "text/plain"}), 415, "unsupported_media_type")
    _assert_error(server.send("POST", path, content=b"{}", headers={**as_json, "Content-Encoding": "gzip"}), 415, "unsupported_media_type")
    _assert_error(server.send("POST", path, content=b" " * 70_000, headers=as_json), 413, "body_too_large")
    _assert_error(server.send("POST", path, content=(b" " * 1000 for _ in range(100)), headers=as_json), 413, "body_too_large")


def _first_problem(path: str) -> tuple[str, str]:
    return {
        "/v1/chat/completions": ("missing_parameter", "messages"),
        "/v1/completions": ("missing_parameter", "prompt"),
        "/v1/embeddings": ("missing_parameter", "input"),
        "/v1/responses": ("missing_parameter", "input"),
        "/v1/encode": ("missing_parameter", "input"),
        "/get_ppl": ("missing_parameter", "input"),
        "/tokenize": ("unknown_parameter", "surprise"),
        "/detokenize": ("missing_parameter", "tokens"),
        "/generate": ("unknown_parameter", "surprise"),
    }[path]


@pytest.mark.parametrize(("method", "path"), [(route.method, route.path) for route in ROUTES])
def test_every_route_refuses_other_methods_in_one_shape(server: ServerProcess, method: str, path: str) -> None:
    response = server.send("PATCH", path.replace("{model:path}", "echo"))
    _assert_error(response, 405, "method_not_allowed")
    assert method in response.headers["allow"]


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/health/", "/%00", "/v1/chat/completions/"])
def test_an_unknown_path_is_an_error_in_the_same_shape(server: ServerProcess, path: str) -> None:
    _assert_error(server.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", {"model": "other", "messages": [{"role": "user", "content": "a"}]}, 404, "model_not_found", "model"),
        ("/v1/completions", {"model": "other", "prompt": "a"}, 404, "model_not_found", "model"),
        ("/tokenize", {"model": "other", "prompt": "a"}, 404, "model_not_found", "model"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 4000}]}, 400, "context_length_exceeded", "messages"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 5000}, 400, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"prompt": ["a", "a" * 4000]}, 400, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"prompt": "a" * 60_000}, 400, "context_length_exceeded", "prompt"),
        ("/v1/completions", {"prompt": "a", "temperature": 3}, 400, "invalid_value", "temperature"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias"),
        ("/v1/chat/completions", {"messages": [], "tools": []}, 400, "invalid_value", "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
            *(400, "missing_parameter", "tools[0].function"),
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": []}},
            *(400, "invalid_value", "chat_template_kwargs"),
        ),
        ("/detokenize", {"tokens": [999_999]}, 400, "invalid_value", "tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_cause_and_field(
    server: ServerProcess, path: str, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    _assert_error(server.post(path, body), status, code, param)


def test_a_bad_stream_is_refused_with_a_status_before_it_begins(server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model="echo", messages=_user("a" * 4000), stream=True)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"


def test_the_clients_own_exceptions_are_raised(server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("other")
    with pytest.raises(openai.BadRequestError):
        server.client().chat.completions.create(model="echo", messages=_user("a"), temperature=9)


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    with running(write_model(tmp_path / "base", template=None), "--drain-delay=0", "--served-model-name=org/base") as server:
        error = _assert_error(server.post("/v1/chat/completions", {"messages": _user("a")}), 400, "invalid_template", "messages")
        assert "/v1/completions" in error["message"]
        assert server.client().completions.create(model="org/base", prompt="a").choices[0].text == "a"
        assert server.client().models.retrieve("org/base").id == "org/base"


def test_a_snapshot_of_a_hugging_face_cache_is_served_by_its_repositorys_name(tmp_path: Path) -> None:
    with running(write_model(tmp_path / "models--org--name" / "snapshots" / "0a1b2c"), "--drain-delay=0") as server:
        assert [model.id for model in server.client().models.list()] == ["org/name"]
        assert server.client().completions.create(model="org/name", prompt="a").choices[0].text == "a"


def test_a_chat_template_can_be_given_in_the_place_of_the_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("<own>{{ messages[-1].content }}</own>")
    flags = ("--drain-delay=0", "--api-workers=2", f"--chat-template={tmp_path / 'own.jinja'}")
    for template in ("{{ messages[0].content }}", None):
        with running(write_model(tmp_path / "model", template=template), *flags) as server:
            for _ in range(4):
                tokens = server.post("/tokenize", {"messages": _user("a")}).json()["tokens"]
                assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == "<own>a</own>"


@pytest.mark.parametrize(("given_template", "cause"), [(None, "No such file"), (b"\xff", "utf-8"), (b"{% broken", "template is invalid")])
def test_a_given_chat_template_that_cannot_be_used_ends_the_server(given_template: bytes | None, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    if given_template is not None:
        file.write_bytes(given_template)
    server = ServerProcess(write_model(tmp_path / "model"), f"--chat-template={file}")
    assert server.wait_exit() == 64
    assert cause in server.lines[-1] and "--chat-template" in server.lines[-1]


def test_a_poisoned_request_fails_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "poison", fail_at="request", error="ValueError: cannot run this")
    with running(model, "--drain-delay=0") as server:
        error = _assert_error(server.post("/v1/completions", {"prompt": "\x01"}), 500, "engine_error")
        assert "cannot run this" in error["message"]
        assert server.post("/v1/completions", {"prompt": "fine"}).json()["choices"][0]["text"] == "fine"


# ---- load


def test_a_full_queue_is_answered_with_when_to_come_back(slow: ServerProcess) -> None:
    body = {"prompt": MANY, "max_tokens": 1000, "stream": True}
    with httpx.Client(timeout=30) as client, _open_streams(client, slow, body, 2):
        waiting = threading.Thread(target=lambda: _try_post(slow, {"prompt": "a", "max_tokens": 2}))
        waiting.start()
        wait_until(lambda: slow.metric("gantline_num_requests_waiting") == 1, what="one request waits")
        response = slow.post("/v1/completions", {"prompt": "a"})
        error = _assert_error(response, 429, "queue_full")
        assert error["type"] == "rate_limit_error" and 1 <= int(response.headers["retry-after"]) <= 60
        assert slow.get("/health").status_code == 200 == slow.get("/ready").status_code
    waiting.join(30)
    assert not waiting.is_alive()


def _try_post(server: ServerProcess, body: Any) -> None:
    server.post("/v1/completions", body)


class _open_streams:
    """Streams that have given their first event; leaving them closes their connections in the middle."""

    def __init__(self, client: httpx.Client, server: ServerProcess, body: dict[str, Any], count: int) -> None:
        self._contexts = [client.stream("POST", f"{server.url}/v1/completions", json=body) for _ in range(count)]

    def __enter__(self) -> None:
        # The iterators must live: httpx closes a stream whose iterator is dropped.
        self._lines = [context.__enter__().iter_lines() for context in self._contexts]
        for lines in self._lines:
            next(lines)

    def __exit__(self, *error: object) -> None:
        for context in self._contexts:
            context.__exit__(None, None, None)


def test_more_choices_than_the_server_could_ever_queue_are_refused_for_good(slow: ServerProcess) -> None:
    _assert_error(slow.post("/v1/completions", {"prompt": "a", "n": 4}), 400, "invalid_value", "n")


def test_a_client_that_leaves_in_mid_stream_frees_its_blocks(slow: ServerProcess) -> None:
    aborted = slow.metric("gantline_request_success_total", finished_reason="abort")
    with httpx.Client(timeout=30) as client, _open_streams(client, slow, {"prompt": MANY, "max_tokens": 1000, "stream": True}, 2):
        wait_until(lambda: slow.metric("gantline_kv_cache_usage_perc") > 0.1, what="the requests hold blocks")
    seconds = wait_until(lambda: slow.metric("gantline_kv_cache_usage_perc") == 0, what="the blocks are free")
    assert seconds < 3  # two steps, and a report every half second
    assert slow.metric("gantline_request_success_total", finished_reason="abort") == aborted + 2
    assert slow.metric("gantline_num_requests_running") == 0


def test_a_client_that_leaves_before_the_answer_frees_its_blocks(slow: ServerProcess) -> None:
    body = json.dumps({"prompt": MANY, "max_tokens": 1000}).encode()
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: slow.metric("gantline_num_requests_running") == 1, what="the request runs")
    wait_until(lambda: slow.metric("gantline_kv_cache_usage_perc") == 0, what="the blocks are free")
    assert any(line.get("status") == 499 for line in slow.logs)


async def test_many_clients_that_leave_at_random_leave_nothing_behind(slow: ServerProcess) -> None:
    async def ask(client: httpx.AsyncClient, patience_s: float) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            await client.post(
                f"{slow.url}/v1/completions",
                json={"prompt": MANY, "max_tokens": 40, "n": 1 + int(patience_s * 100) % 3},
                timeout=patience_s,
            )

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=50)) as client:
        await asyncio.gather(*(ask(client, 0.01 + 0.03 * i) for i in range(40)))
    wait_until(lambda: slow.metric("gantline_kv_cache_usage_perc") == 0, what="every block is free")
    assert slow.metric("gantline_num_requests_running") == 0 == slow.metric("gantline_num_requests_waiting")


# ---- what it tells about itself


def test_metrics_count_what_happened(server: ServerProcess) -> None:
    before = server.get("/metrics").text
    server.post("/v1/completions", {"prompt": "abcde", "max_tokens": 3, "n": 2})
    after = server.get("/metrics").text

    def change(name: str, **labels: str) -> float:
        return read_metric(after, name, **labels) - read_metric(before, name, 0.0, **labels)

    assert change("gantline_prompt_tokens_total") == 12
    assert change("gantline_generation_tokens_total") == 6
    assert change("gantline_request_success_total", finished_reason="length") == 2
    timed = ("request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time")
    for name in ("time_to_first_token", "e2e_request_latency", *timed):
        assert change(f"gantline_{name}_seconds_count") == 2, name
    assert change("gantline_inter_token_latency_seconds_count") == 4
    assert change("gantline_request_prompt_tokens_sum") == 12 and change("gantline_request_generation_tokens_sum") == 6
    parts = {line.split('"')[1] for line in after.splitlines() if line.startswith("gantline_engine_step_seconds_total{")}
    assert parts == {"schedule", "launch", "wait", "mask", "device", "postprocess"}
    assert change("gantline_http_requests_total", route="/v1/completions", method="POST", status="200") == 1
    assert read_metric(after, "gantline_state", state="ready") == 1
    assert read_metric(after, "gantline_memory_promised_bytes", part="weights") == 900
    assert read_metric(after, "gantline_startup_seconds", phase="total") > 0


def test_made_up_paths_do_not_become_labels(server: ServerProcess) -> None:
    for i in range(3):
        server.get(f"/made/up/{i}")
    routes = {line.split('route="')[1].split('"')[0] for line in server.get("/metrics").text.splitlines() if 'route="' in line}
    assert "other" in routes and not any("made" in route for route in routes)


def test_the_log_tells_of_requests_but_never_what_they_said(server: ServerProcess) -> None:
    secret = "open sesame"
    for path, body in (("/v1/chat/completions", {"messages": _user(secret)}), ("/v1/completions", {"prompt": secret, "stream": True})):
        response = server.post(path, body, headers={"X-Request-Id": "known-id", "Authorization": f"Bearer {secret}"})
        assert response.headers["x-request-id"] == "known-id"
    wait_until(lambda: sum(line.get("request_id") == "known-id" for line in server.logs) == 2, what="both requests are logged")
    line = next(line for line in server.logs if line.get("request_id") == "known-id")
    assert line["message"] == "request" and line["status"] == 200 and line["completion_tokens"] == len(secret) + 1
    assert not any(secret in line for line in server.lines)


def test_an_odd_request_id_is_not_taken_over(server: ServerProcess) -> None:
    response = server.get("/version", headers={"X-Request-Id": 'a"\tb'})
    assert response.headers["x-request-id"] != 'a"\tb' and len(response.headers["x-request-id"]) == 32
