"""Bodies of requests, broken in every way that a random walk finds: in their structure, in their values, in their bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

__all__ = ["BODIES", "CONSTRAINED", "GARBAGE", "mutated_request"]

_USER = {"role": "user", "content": "Hi é 😀"}
_FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
CONSTRAINED: list[dict[str, Any]] = [
    {"messages": [_USER], "tools": [{"type": "function", "function": _FUNCTION}], "tool_choice": "required", "max_tokens": 3},
    {"messages": [_USER], "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA}}, "max_tokens": 3},
    {"messages": [_USER], "structured_outputs": {"regex": "[a-c]+"}, "max_tokens": 3},
    {"messages": [_USER], "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 3},
    {"messages": [_USER], "structured_outputs": {"grammar": 'root ::= "a" root | "b"'}, "max_tokens": 3},
]
"""Bodies that a grammar comes of."""

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        *CONSTRAINED,
        {"messages": [{"role": "system", "content": "Be brief."}, _USER], "max_tokens": 4, "stream": True},
        {"messages": [_USER], "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3, "stop": ["x", "yy"]},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "max_tokens": 3,
        },
    ],
    "/v1/completions": [
        {"prompt": "abc", "max_tokens": 4, "echo": True, "logprobs": 1, "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": [[1, 2, 3], [4]], "n": 2, "best_of": 1, "max_tokens": 3, "presence_penalty": 0.5, "frequency_penalty": 1, "min_p": 0.1},
        {"prompt": ["a", "b"], "logit_bias": {"5": 3}, "min_tokens": 1, "bad_words": ["c"], "repetition_penalty": 1.2, "max_tokens": 2},
    ],
    "/v1/responses": [
        {"input": "a", "tools": [{"type": "function", **_FUNCTION}], "tool_choice": "none", "max_output_tokens": 3},
        {"input": [_USER, {"type": "function_call_output", "call_id": "c", "output": "1"}], "instructions": "x", "max_output_tokens": 3},
        {"input": "hello", "stream": True, "text": {"format": {"type": "text"}}, "metadata": {"a": "b"}, "max_output_tokens": 3},
    ],
    "/v1/embeddings": [{"input": ["a", "bc"], "encoding_format": "base64", "pooling": "mean"}, {"input": [1, 2, 3]}],
    "/generate": [{"prompt": "abc", "max_tokens": 3, "return_logprob": True}, {"input_ids": [1, 2], "max_tokens": 2, "stream": True}],
    "/get_ppl": [{"input": "abcdef"}],
    "/v1/encode": [{"input": ["a", "b"], "do_preprocess": True}],
    "/tokenize": [{"messages": [_USER], "chat_template_kwargs": {"a": [1]}}, {"prompt": "a"}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 65536, 1 << 31, -(1 << 31), 1 << 63, -(1 << 64), 10**40),
    *(0.0, -0.0, 1e-30, 1e308, -1e308, 0.1, float("nan"), float("inf")),
    *("", "a", "\x00", "é" * 50, "😀", "\ud800", "<|end|>", "{{ 7 * 7 }}", "../../etc/passwd", "x" * 3000, "auto", "none", "json_object"),
    *([], [[]], [None], [0] * 50, ["a"] * 50, [1.5], [[1], "a"]),
    *({}, {"": ""}, {"a": {"b": {"c": []}}}, {"type": "text", "text": "a"}, {"role": "user", "content": "a"}),
)
_NAMES = (
    *("model", "messages", "prompt", "input", "max_tokens", "n", "stream", "tools", "tool_choice", "response_format", "stop", "logprobs"),
    *("logit_bias", "temperature", "store", "functions", "user", "seed", "timeout", "priority", "reasoning_effort", "parallel_tool_calls"),
    *(
        "text",
        "type",
        "role",
        "content",
        "grammar",
        "guided_json",
        "__proto__",
        "chat_template_kwargs",
        "ignore_eos",
        "skip_special_tokens",
    ),
    *("stop_token_ids", "x" * 300),
)


GARBAGE = (
    b"\x00\x01\x02\r\n\r\n",
    b"GET\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\nContent-Type: application/json\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\nZZ\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 5000 + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX-Bad\x00Name: \xff\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\nContent-Type: application/json\r\n\r\n{",
)
"""What is not HTTP, or hardly."""


def mutated_request(rng: random.Random, bodies: dict[str, list[dict[str, Any]]] = BODIES) -> tuple[str, bytes, dict[str, str]]:
    """(path, body, headers) of a request that was right before one to four things happened to it."""
    path = rng.choice(list(bodies))
    body: Any = copy.deepcopy(rng.choice(bodies[path]))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        body = _mutate(body, rng)
    data = json.dumps(body).encode()
    if rng.random() < 0.1:
        data = _mutate_bytes(data, rng)
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.03:
        headers["Content-Type"] = rng.choice(
            ["text/plain", "application/json; charset=utf-16", "application/xml", "", "multipart/form-data"]
        )
    return (rng.choice(list(bodies)) if rng.random() < 0.05 else path), data, headers


def _mutate(body: Any, rng: random.Random) -> Any:
    """Change one place of `body`: its value, its being there, or its name."""
    places = list(_places(body))
    if not places or rng.random() < 0.02:
        return rng.choice(_VALUES)
    container, key = rng.choice(places)
    match rng.randrange(9):
        case 0:
            container[key] = copy.deepcopy(rng.choice(_VALUES))
        case 1 | 6 | 7 | 8:
            same = [value for value in _VALUES if type(value) is type(container[key])]
            container[key] = copy.deepcopy(rng.choice(same or _VALUES))
        case 2:
            del container[key]
        case 3 if isinstance(container, dict):
            container[rng.choice(_NAMES)] = copy.deepcopy(rng.choice(_VALUES))
        case 4 if isinstance(container, dict):
            container[rng.choice(_NAMES)] = container.pop(key)
        case 4 | 3:
            container.insert(key, copy.deepcopy(rng.choice(_VALUES)))
        case 5:
            container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}
    return body


def _places(body: Any) -> Any:
    """(container, key) of everything inside `body`."""
    items: Any = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield body, key
        yield from _places(value)


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data)) if data else 0
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at:]
        case 3:
            return data[:at] + data
        case _:
            return data.replace(b":", b": " + rng.choice([b"[" * 200, b"1e400", b"0x1", b"'a'", b"-", b"\\u0000"]), 1)
