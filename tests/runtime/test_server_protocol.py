"""Every parameter of OpenAI's API works, is harmless, or is refused by name; every bad value is named with its path."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pydantic
import pytest
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.server import parameters
from gantline_runtime.server.errors import ApiError, translate_validation
from gantline_runtime.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, SamplingFields, TokenizeRequest
from gantline_runtime.server.sampling import build_sampling, num_new_tokens, seeded
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

HELLO = [{"role": "user", "content": "Hello"}]


def _refusal(model: type[pydantic.BaseModel], body: Any) -> ApiError:
    text = body if isinstance(body, (str, bytes)) else json.dumps(body)
    with pytest.raises(pydantic.ValidationError) as caught:
        model.model_validate_json(text)
    return translate_validation(caught.value)


def _known_parameters(module: Any, name: str) -> set[str]:
    return {
        key for base in vars(module).values() if isinstance(base, type) and base.__name__.startswith(name) for key in get_type_hints(base)
    }


@pytest.mark.parametrize(
    ("model", "module", "table"),
    [
        (ChatRequest, chat_create_params, parameters.UNSUPPORTED_CHAT),
        (CompletionRequest, completion_create_params, parameters.UNSUPPORTED_COMPLETION),
    ],
)
def test_every_parameter_of_the_openai_client_is_supported_harmless_or_refused_by_name(
    model: type[SamplingFields], module: Any, table: dict[str, Any]
) -> None:
    known = _known_parameters(module, "CompletionCreateParams")
    assert len(known) > 15
    assert known <= model.model_fields.keys() | set(parameters.HARMLESS) | table.keys()


@pytest.mark.parametrize("name", sorted(parameters.UNSUPPORTED_CHAT))
def test_an_unsupported_parameter_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    for neutral in (*parameters.UNSUPPORTED_CHAT[name], None):
        ChatRequest.model_validate_json(json.dumps({"messages": HELLO, name: neutral}))
    error = _refusal(ChatRequest, {"messages": HELLO, name: {"something": 1}})
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", name) and name in str(error)


def test_harmless_parameters_are_accepted() -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
    }
    ChatRequest.model_validate_json(json.dumps({"messages": HELLO, **harmless}))


def test_an_answer_may_be_sent_back_as_the_client_got_it() -> None:
    answer = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    fields = ChatRequest.model_validate_json(json.dumps({"messages": [*HELLO, answer, *HELLO]}))
    assert fields.messages[1].for_template() == {"role": "assistant", "content": "Hi"}


def test_parts_of_a_message_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    fields = ChatRequest.model_validate_json(json.dumps({"messages": [{"role": "developer", "content": parts, "name": "x"}]}))
    assert fields.messages[0].for_template() == {"role": "system", "content": "a\nb", "name": "x"}


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": None}, "missing_parameter", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"messages": [{"content": "x"}]}, "missing_parameter", "messages[0].role"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "missing_parameter", "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_parameter", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": 1}}]}, "unsupported_parameter", "messages[0].audio"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "invalid_value", "messages[0].tool_call_id"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "invalid_value", "messages[0].tool_calls[0].id"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_value", "temperature"),
        ({"temperature": True}, "invalid_value", "temperature"),
        ({"top_p": 1.5}, "invalid_value", "top_p"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"top_k": 1.5}, "invalid_value", "top_k"),
        ({"min_p": 2}, "invalid_value", "min_p"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 1000}, "invalid_value", "n"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
        ({"stop": ""}, "invalid_value", "stop[0]"),
        ({"stop": ["a", ""]}, "invalid_value", "stop[1]"),
        ({"stop": ["a"] * 65}, "invalid_value", "stop"),
        ({"stop": 7}, "invalid_value", "stop"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1"),
        ({"logit_bias": [1]}, "invalid_value", "logit_bias"),
        ({"seed": 1 << 63}, "invalid_value", "seed"),
        ({"seed": 1.5}, "invalid_value", "seed"),
        ({"top_logprobs": 21, "logprobs": True}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": 3}, "invalid_value", "logprobs"),
        ({"stream": "yes"}, "invalid_value", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "invalid_value", "stream_options.continuous_usage_stats"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "unsupported_parameter", "stream_options.include_obfuscation"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]"),
        ({"min_tokens": -1}, "invalid_value", "min_tokens"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"model": 5}, "invalid_value", "model"),
        ({"chat_template_kwargs": "x"}, "invalid_value", "chat_template_kwargs"),
    ],
)
def test_a_bad_chat_request_is_named_by_field(change: dict[str, Any], code: str, param: str) -> None:
    error = _refusal(ChatRequest, {"messages": HELLO, **change})
    assert (error.status, error.code, error.param) == (400, code, param)
    assert param.rpartition(".")[2] in str(error) or "Content of type 'image_url'" in str(error)
    assert "Value error" not in str(error)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_parameter", "prompt"),
        ({"prompt": []}, "invalid_value", "prompt"),
        ({"prompt": {}}, "invalid_value", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_value", "prompt[0][1]"),
        ({"prompt": ["a", [1]]}, "invalid_value", "prompt[1]"),
        ({"prompt": [[1], "a"]}, "invalid_value", "prompt[1]"),
        ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
        ({"prompt": [[-1]]}, "invalid_value", "prompt[0][0]"),
        ({"prompt": ["a"] * 257}, "invalid_value", "prompt"),
        ({"prompt": ["a"] * 200, "n": 2}, "invalid_value", "n"),
        ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"prompt": "a", "min_tokens": 1, "min_new_tokens": 2}, "invalid_value", "min_new_tokens"),
        ({"prompt": "a", "bad_words": [""]}, "invalid_value", "bad_words[0]"),
        ({"prompt": "a", "prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1, "echo": True, "logprobs": 1}, "invalid_value", "prompt_logprobs"),
        ({"prompt": "a", "best_of": 2}, "unsupported_parameter", "best_of"),
        ({"prompt": "a", "suffix": "b"}, "unsupported_parameter", "suffix"),
        ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs"),
    ],
)
def test_a_bad_completion_request_is_named_by_field(body: dict[str, Any], code: str, param: str) -> None:
    error = _refusal(CompletionRequest, body)
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_a_prompt_has_four_forms(prompt: Any) -> None:
    fields = CompletionRequest.model_validate_json(json.dumps({"prompt": prompt}))
    assert fields.prompt == ([prompt] if prompt in ("a", [1, 2]) else prompt)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"a": "\\ud800"}', b'{"seed": ' + b"9" * 5000 + b"}"],
)
def test_what_is_not_a_json_object_is_an_error_like_any_other(body: bytes) -> None:
    error = _refusal(ChatRequest, body)
    assert error.status == 400 and error.code in ("invalid_json", "invalid_value") and str(error).startswith(("The body", "messages: "))


def test_tokenizing_takes_either_a_text_or_messages() -> None:
    for body in ({}, {"prompt": "a", "messages": HELLO}):
        assert _refusal(TokenizeRequest, body).param == "prompt"
    assert _refusal(DetokenizeRequest, {"tokens": ["a"]}).param == "tokens[0]"


def test_what_a_request_leaves_out_comes_from_the_checkpoint() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.2)
    silent = build_sampling(SamplingFields(), defaults, max_new_tokens=5, num_logprobs=None, vocab_size=10)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.min_p, silent.repetition_penalty) == (0.6, 0.9, 20, 0.1, 1.2)
    spoken = SamplingFields(temperature=0.0, top_p=0.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, logit_bias={"3": 2.0}, seed=-5)
    params = build_sampling(spoken, defaults, max_new_tokens=5, num_logprobs=2, vocab_size=10)
    assert (params.temperature, params.top_k, params.min_p, params.logit_bias, params.num_logprobs) == (0.0, 0, 0.0, {3: 2.0}, 2)
    assert 0 < params.top_p < 1e-5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"10": 1.0}}, "logit_bias"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"stop_token_ids": [10]}, "stop_token_ids"),
        ({"min_tokens": 6}, "min_tokens"),
    ],
)
def test_values_that_the_model_bounds_are_checked_against_it(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        build_sampling(SamplingFields(**fields), GenerationDefaults(), max_new_tokens=5, num_logprobs=None, vocab_size=10)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_the_context_bounds_prompt_and_answer_together() -> None:
    assert num_new_tokens(None, 10, 100, default=None, param="messages") == 90
    assert num_new_tokens(None, 10, 100, default=16, param="prompt") == 16
    assert num_new_tokens(None, 95, 100, default=16, param="prompt") == 5
    assert num_new_tokens(90, 10, 100, default=None, param="messages") == 90
    for wanted, prompt_len in ((91, 10), (None, 100), (1, 500)):
        with pytest.raises(ApiError) as caught:
            num_new_tokens(wanted, prompt_len, 100, default=None, param="messages")
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_each_choice_has_a_seed_of_its_own() -> None:
    params = build_sampling(SamplingFields(seed=(1 << 63) - 1), GenerationDefaults(), max_new_tokens=5, num_logprobs=None, vocab_size=10)
    seeds = [seeded(params, choice).seed for choice in range(3)]
    assert seeds == [(1 << 63) - 1, -(1 << 63), -(1 << 63) + 1]
