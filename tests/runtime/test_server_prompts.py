"""Embeddings, scores, echo with log-probabilities, LMDeploy's endpoints, by HTTP: shapes with a fake engine, numbers with a real one."""

from __future__ import annotations

import base64
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from gantline_runtime.engine_process import REPORT_INTERVAL_S
from gantline_runtime.server import parameters
from gantline_runtime.server.protocol_prompts import EmbeddingRequest
from openai.types import EmbeddingCreateParams

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import REAL, ROOT, ServerProcess, events, running, wait_until

TINY = ROOT / "examples" / "tiny-model"
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("prompts") / "echo", session_len=600)
    with running(model, "--drain-delay=0", "--max-prefill-token-num=64", "--max-batch-size=4", "--max-waiting=4") as server:
        yield server


def _refused(server: ServerProcess, path: str, body: Any) -> tuple[int, str, str | None]:
    response = server.post(path, body)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


# ---- embeddings


def test_the_openai_client_gets_a_vector_of_length_one_for_each_input(server: ServerProcess) -> None:
    for given, tokens in (("abc", 4), (["abc", "de"], 7), ([1, 2, 3], 3), ([[1, 2], [3]], 3)):
        answer = server.client().embeddings.create(model="echo", input=given)  # the client asks for base64 by itself
        assert [item.index for item in answer.data] == list(range(len(answer.data)))
        assert all(item.embedding == pytest.approx([0.6, 0.0, 0.8, 0.0]) for item in answer.data)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    assert len(server.client().embeddings.create(model="echo", input=["a"] * 5, encoding_format="float").data) == 5


def test_as_many_inputs_are_embedded_as_openai_takes_without_filling_the_queue(server: ServerProcess) -> None:
    """The server runs and queues fewer at a time."""
    answer = server.client().embeddings.create(model="echo", input=[[1] * (1 + i % 3) for i in range(2048)])
    assert [item.index for item in answer.data] == list(range(2048))
    assert answer.usage.prompt_tokens == sum(1 + i % 3 for i in range(2048))
    wait_until(lambda: server.metric("gantline_num_requests_running") == 0, what="nothing is left")
    assert server.post("/v1/embeddings", {"input": ["a"] * 2049}).json()["error"]["param"] == "input"
    assert server.post("/v1/embeddings", {"input": ["a"] * 20 + [""], "add_special_tokens": False}).status_code == 400
    assert server.post("/v1/embeddings", {"input": ["a"] * 2000, "timeout": 1e-9}).status_code == 504


def test_an_embedding_comes_as_numbers_or_as_their_bytes_and_with_its_own_length_if_asked(server: ServerProcess) -> None:
    body = {"input": "abcd", "normalize": False, "pooling": "mean"}
    numbers = server.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    coded = server.post("/v1/embeddings", {**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert numbers == np.frombuffer(base64.b64decode(coded), dtype="<f4").tolist() == [3.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"input": ""}, (200, "", None)),  # the tokenizer puts a token before every text
        ({"input": "", "add_special_tokens": False}, (400, "invalid_value", "input")),
        ({"input": []}, (400, "invalid_value", "input")),
        ({"input": [99999]}, (400, "invalid_value", "input")),
        ({"input": "a" * 600}, (400, "context_length_exceeded", "input")),
        ({"input": "a", "priority": -11}, (400, "invalid_value", "priority")),
        ({"input": "a", "timeout": 1e-9}, (504, "deadline_exceeded", None)),
        ({"input": "a", "dimensions": 8}, (400, "unsupported_parameter", "dimensions")),
        ({"input": "a", "pooling": "max"}, (400, "invalid_value", "pooling")),
        ({"input": "a", "encoding_format": "int8"}, (400, "invalid_value", "encoding_format")),
        ({"input": "a", "model": "other"}, (404, "model_not_found", "model")),
    ],
)
def test_an_embedding_that_cannot_be_made_is_refused(server: ServerProcess, body: dict[str, Any], problem: tuple[int, str, str]) -> None:
    if problem[0] == 200:
        assert server.post("/v1/embeddings", body).status_code == 200
    else:
        assert _refused(server, "/v1/embeddings", body) == problem


def test_every_parameter_of_the_openai_client_for_embeddings_is_supported_harmless_or_refused_by_name() -> None:
    known = set(get_type_hints(EmbeddingCreateParams))
    assert len(known) > 4
    assert known <= EmbeddingRequest.model_fields.keys() | set(parameters.HARMLESS) | parameters.UNSUPPORTED_EMBEDDING.keys()


def test_the_checkpoint_says_how_its_embeddings_are_pooled(tmp_path: Path) -> None:
    from gantline_runtime.pooling import load_pooling

    assert load_pooling(tmp_path) == "last"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert load_pooling(tmp_path) == "mean"
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true, "pooling_mode_mean_tokens": false}')
    assert load_pooling(tmp_path) == "last"


# ---- perplexity


def test_the_perplexity_of_a_text_comes_with_its_cross_entropy(server: ServerProcess) -> None:
    for given, count in (("abc", 3), ("x" * 500, 500), ([1, 2, 3], 2)):
        assert server.post("/get_ppl", {"input": given}).json() == {
            "ppl": 0.5,
            "perplexity": pytest.approx(math.exp(0.5)),
            "num_tokens": count,
        }
    assert _refused(server, "/get_ppl", {"input": [5]}) == (400, "invalid_value", "input")
    assert _refused(server, "/get_ppl", {"input": "x" * 600}) == (400, "context_length_exceeded", "input")


# ---- echo with log-probabilities


def test_an_echoed_prompt_has_log_probabilities_from_its_second_token_on(server: ServerProcess) -> None:
    answer = server.client().completions.create(model="echo", prompt="aé", echo=True, logprobs=1, max_tokens=2)
    choice = answer.choices[0]
    assert choice.text == "aéa\ufffd" and choice.logprobs is not None
    assert choice.logprobs.tokens == ["<|begin|>", "a", "\ufffd", "\ufffd", "a", "\ufffd"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.25, -0.25]
    assert choice.logprobs.text_offset == [0, 0, 1, 1, 2, 3]
    top = choice.logprobs.top_logprobs
    assert top is not None and top[0] is None and [len(entry) for entry in top[1:]] == [1, 1, 1, 1, 1]  # type: ignore[arg-type]


def test_a_prompt_may_be_scored_without_generating(server: ServerProcess) -> None:
    body = {"prompt": ["x" * 200, "yz"], "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = server.post("/v1/completions", body).json()
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [201, 3]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["choices"][0]["text"] == "x" * 200 and answer["usage"]["completion_tokens"] == 0
    alone = server.post("/v1/completions", {"prompt": "ab", "echo": True, "max_tokens": 0, "n": 2}).json()
    assert [choice["text"] for choice in alone["choices"]] == ["ab", "ab"]
    single = server.post("/v1/completions", {**body, "prompt": [[7]]}).json()["choices"][0]
    assert single["logprobs"]["token_logprobs"] == [None] and single["finish_reason"] == "length"


@pytest.mark.parametrize("length", [1, 70, 290])
@pytest.mark.parametrize("n", [1, 3])
def test_an_echoed_stream_is_the_whole_answer_in_pieces(server: ServerProcess, length: int, n: int) -> None:
    body = {"prompt": ["é" * length], "echo": True, "logprobs": 2, "max_tokens": 5, "n": n, "return_token_ids": True}
    whole = server.post("/v1/completions", body).json()["choices"]
    pieces: list[dict[str, Any]] = [{"text": "", "token_ids": [], "logprobs": {}, "finish_reason": None} for _ in range(n)]
    for event in events(server.post("/v1/completions", {**body, "stream": True}).text):
        for choice in event["choices"]:
            into = pieces[choice["index"]]
            into["text"] += choice["text"]
            into["token_ids"] += choice.get("token_ids", [])
            into["finish_reason"] = choice["finish_reason"] or into["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                into["logprobs"].setdefault(name, []).extend(values)
    for index, piece in enumerate(pieces):
        assert {**piece, "index": index} == whole[index]


def test_prompt_logprobs_name_each_token_of_the_prompt_with_its_rank(server: ServerProcess) -> None:
    body = {"prompt": ["ab", "c"], "prompt_logprobs": 1, "max_tokens": 1, "n": 2}
    choices = server.post("/v1/completions", body).json()["choices"]
    a, b, c = server.post("/tokenize", {"prompt": "abc", "add_special_tokens": False}).json()["tokens"]
    text = {token: server.post("/detokenize", {"tokens": [token]}).json()["prompt"] for token in (a, b, c, a + 1, b + 1, c + 1)}

    def entry(token: int) -> dict[str, Any]:
        own = {"logprob": -0.5, "rank": 7, "decoded_token": text[token]}
        return {str(token): own, str(token + 1): {"logprob": -0.25, "rank": 1, "decoded_token": text[token + 1]}}

    assert [choice["prompt_logprobs"] for choice in choices] == [[None, entry(a), entry(b)]] * 2 + [[None, entry(c)]] * 2
    alone = server.post("/v1/completions", {**body, "max_tokens": 0, "n": 1}).json()
    assert [len(choice["prompt_logprobs"]) for choice in alone["choices"]] == [3, 2] and alone["usage"]["completion_tokens"] == 0


def test_a_chat_answers_with_the_log_probabilities_of_its_prompt_once_for_all_choices(server: ServerProcess) -> None:
    messages: Any = [{"role": "user", "content": "abc"}]
    ids = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    answer = server.client().chat.completions.create(model="echo", messages=messages, n=2, extra_body={"prompt_logprobs": 2})
    assert [choice.message.content for choice in answer.choices] == ["abc", "abc"]
    scores = answer.model_extra["prompt_logprobs"]  # type: ignore[index]
    assert scores[0] is None and len(scores) == len(ids)
    for token, entry in zip(ids[1:], scores[1:], strict=True):
        assert list(entry) == [str(token), str(token + 1), str(token + 2)] and entry[str(token)]["logprob"] == -0.5
    refused = server.post("/v1/chat/completions", {"messages": messages, "prompt_logprobs": 2, "stream": True})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"


# ---- LMDeploy's


def test_generate_gives_text_tokens_and_their_log_probabilities(server: ServerProcess) -> None:
    answer = server.post("/generate", {"prompt": "abc", "return_logprob": True}).json()
    ids = server.post("/tokenize", {"prompt": "abc", "add_special_tokens": False}).json()["tokens"]
    assert answer["text"] == "abc" and answer["output_ids"] == [*ids, 257]
    assert answer["meta_info"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[-0.25, token] for token in [*ids, 257]],
    }
    assert server.post("/generate", {"input_ids": ids, "max_tokens": 2}).json()["text"] == "ab"


def test_generate_streams_what_was_added(server: ServerProcess) -> None:
    whole = server.post("/generate", {"prompt": "aé"}).json()
    text = server.post("/generate", {"prompt": "aé", "stream": True}).text
    assert text.endswith("data: [DONE]\n\n")
    pieces = events(text)
    assert "".join(piece["text"] for piece in pieces) == whole["text"] == "aé"
    assert [token for piece in pieces for token in piece["output_ids"]] == whole["output_ids"]
    assert pieces[-1]["meta_info"] == whole["meta_info"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "input_ids": [1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"input_ids": []}, "input_ids"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "image_data": "x"}, "image_data"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "session_id": 7}, "session_id"),
    ],
)
def test_generate_refuses_by_name(server: ServerProcess, body: dict[str, Any], param: str) -> None:
    assert _refused(server, "/generate", body)[::2] == (400, param)


def test_texts_are_encoded_one_or_several_with_or_without_a_template(server: ServerProcess) -> None:
    assert server.post("/v1/encode", {"input": "ab"}).json()["length"] == 3
    assert server.post("/v1/encode", {"input": ["ab", "c"], "add_bos": False}).json()["length"] == [2, 1]
    assert server.post("/v1/encode", {"input": "ab", "do_preprocess": True}).json()["length"] == 5


# ---- further fields


def test_a_stop_string_is_part_of_the_answer_if_asked_for(server: ServerProcess) -> None:
    body = {"prompt": "one STOP two", "stop": "STOP", "include_stop_str_in_output": True}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"] == "one STOP"
    stream = events(server.post("/v1/completions", {**body, "stream": True}).text)
    assert "".join(event["choices"][0]["text"] for event in stream) == "one STOP"


def test_generated_token_numbers_are_returned_if_asked_for(server: ServerProcess) -> None:
    ids = server.post("/tokenize", {"prompt": "hi", "add_special_tokens": False}).json()["tokens"]
    body = {"messages": [{"role": "user", "content": "hi"}], "return_token_ids": True}
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["token_ids"] == [*ids, 257]
    stream = events(server.post("/v1/chat/completions", {**body, "stream": True}).text)
    assert [token for event in stream for token in event["choices"][0].get("token_ids", [])] == [*ids, 257]


# ---- with a model


@pytest.fixture(scope="module")
def tiny() -> Iterator[ServerProcess]:
    if not (TINY / "model.safetensors").exists():
        pytest.skip("the shipped model is not here")
    with running(TINY, "--drain-delay=0", "--device=cpu", "--num-cache-blocks=64", "--max-prefill-token-num=100", program=REAL) as server:
        yield server


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_scores_perplexity_and_embeddings_are_the_models(tiny: ServerProcess, reference: Any) -> None:
    ids = tiny.post("/v1/encode", {"input": TEXT}).json()["input_ids"]
    with torch.inference_mode():
        result = reference(torch.tensor([ids]), output_hidden_states=True)
    hidden, logprobs = result.hidden_states[-1][0], result.logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)

    echoed = tiny.post("/v1/completions", {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 1}).json()["choices"][0]
    np.testing.assert_allclose(echoed["logprobs"]["token_logprobs"][1:-1], expected.numpy(), atol=2e-3)
    assert tiny.post("/get_ppl", {"input": TEXT}).json()["ppl"] == pytest.approx(-float(expected.mean()), abs=1e-4)
    for pooling, vector in (("last", hidden[-1]), ("mean", hidden.mean(0))):
        answer = tiny.post("/v1/embeddings", {"input": TEXT, "pooling": pooling}).json()["data"][0]["embedding"]
        np.testing.assert_allclose(answer, (vector / vector.norm()).numpy(), atol=1e-4)


def test_choices_share_the_prompts_blocks(tiny: ServerProcess) -> None:
    time.sleep(REPORT_INTERVAL_S + 0.3)  # what earlier tests did is reported by now
    before = tiny.metric("gantline_prefix_cache_hits_total")
    body = {"prompt": "Another text. " * 60, "n": 4, "max_tokens": 2, "temperature": 1.0, "seed": 1}
    usage = tiny.post("/v1/completions", body).json()["usage"]

    full = usage["prompt_tokens"] // 64 * 64
    assert full >= 64 and usage["prompt_tokens_details"]["cached_tokens"] == 0, "the first choice computes it"
    wait_until(lambda: tiny.metric("gantline_prefix_cache_hits_total") - before == 3 * full, what="the other three share its blocks")


def test_bad_words_are_never_generated_and_their_parts_are(tiny: ServerProcess) -> None:
    body: dict[str, Any] = {"prompt": "A list is", "temperature": 0, "max_tokens": 40, "return_token_ids": True}
    free = tiny.post("/v1/completions", body).json()["choices"][0]
    first, second = free["token_ids"][5:7]
    pair = tiny.post("/detokenize", {"tokens": [first, second]}).json()["prompt"]
    spelled = tiny.post("/tokenize", {"prompt": pair, "add_special_tokens": False}).json()["tokens"]
    assert spelled == [first, second], "the tokenizer spells these two tokens' text in the same way"
    bound = tiny.post("/v1/completions", {**body, "bad_words": [pair]}).json()["choices"][0]["token_ids"]
    assert bound[:6] == free["token_ids"][:6] and bound[6] != second, "only the word's last token was forbidden, and only after its first"
    assert (first, second) not in itertools.pairwise(bound)
