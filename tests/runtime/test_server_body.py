"""Bodies are bounded in size and time, and whatever is in them, the answer is an answer or an error with a cause."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import pydantic
import pytest
from gantline_runtime.server.body import BodyLimits, read_body
from gantline_runtime.server.errors import ApiError, translate_validation
from gantline_runtime.server.protocol import ChatRequest, CompletionRequest
from gantline_runtime.server.sse import ClientLeft, encode_event
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message


def _request(messages: list[Message]) -> Request:
    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)
        raise AssertionError("never")

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


def _chunk(data: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


async def test_a_body_is_put_together_from_its_pieces() -> None:
    sizes: list[int] = []
    assert await read_body(_request([_chunk(b"ab", True), _chunk(b"c", False)]), BodyLimits(3, 60, 60), sizes.append) == b"abc"
    assert sizes[:2] == [2, 3]


@pytest.mark.parametrize(("limits", "cause"), [(BodyLimits(100, 0.05, 60), "within 0.05 s"), (BodyLimits(100, 60, 0.05), "for 0.05 s")])
async def test_a_body_that_never_ends_is_given_up(limits: BodyLimits, cause: str) -> None:
    with pytest.raises(ApiError, match=cause) as caught:
        await read_body(_request([_chunk(b"{", True)]), limits)
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")


async def test_a_body_that_grows_beyond_its_bound_is_refused_before_it_has_arrived() -> None:
    with pytest.raises(ApiError) as caught:
        await read_body(_request([_chunk(b"x" * 60, True), _chunk(b"x" * 60, True)]), BodyLimits(100, 60, 60))
    assert caught.value.status == 413


async def test_a_client_that_leaves_while_sending_is_noticed() -> None:
    with pytest.raises(ClientLeft):
        await read_body(_request([_chunk(b"{", True), {"type": "http.disconnect"}]), BodyLimits(100, 60, 60))


def test_an_event_is_one_line_whatever_a_client_calls_a_line() -> None:
    event = encode_event({"text": "a\nb\r\x85\u2028\u2029\x0b\x1ec"}).decode()
    assert len(event.splitlines()) == 2 and json.loads(event[6:])["text"] == "a\nb\r\x85\u2028\u2029\x0b\x1ec"


_CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"}],
    "temperature": 1.0,
    "stop": ["a"],
    "logit_bias": {"1": 1.0},
    "logprobs": True,
    "top_logprobs": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"a": [1]},
    "tools": [],
    "response_format": {"type": "text"},
}
_COMPLETION = {"prompt": ["a"], "max_tokens": 5, "n": 2, "seed": 1, "logprobs": 1, "echo": False, "stop_token_ids": [1]}
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in inner for found in _paths(child, (*path, key)))]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_mutated_body_is_either_fine_or_an_error_with_a_cause(data: st.DataObject) -> None:
    model, original = data.draw(st.sampled_from([(ChatRequest, _CHAT), (CompletionRequest, _COMPLETION)]))
    mutated: Any = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in _paths(mutated) if p] or [()]))
        if not path:
            break
        target = mutated
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = data.draw(_JSON)
    text = json.dumps(mutated).encode("utf-8", errors="surrogatepass")
    cut = data.draw(st.none() | st.integers(0, len(text)))
    try:
        model.model_validate_json(text[:cut])
    except pydantic.ValidationError as error:
        refusal = translate_validation(error)
        assert refusal.status == 400 and refusal.code and str(refusal)
        json.dumps(refusal.body()).encode()
