"""The whole path with nothing replaced: the shipped model, the real engine, the `openai` client."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gantline_runtime import cli

from tests.runtime.server_process import REAL, ROOT, ServerProcess, running, wait_until

MODEL = ROOT / "examples" / "tiny-model"
QUESTION: list[Any] = [{"role": "user", "content": "What is a list?"}]

pytestmark = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the tiny model is not here")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    flags = ("--drain-delay=0", "--device=cpu", "--num-cache-blocks=128", "--served-model-name=tiny")
    with running(MODEL, *flags, program=REAL) as server:
        yield server


def test_a_chat_is_answered_in_words_and_streams_the_same(server: ServerProcess) -> None:
    whole = server.client().chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=48)
    text = whole.choices[0].message.content
    assert text and sum(word.isalpha() for word in text.split()) >= 5
    stream = server.client().chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=48, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_generate_on_the_terminal_says_the_same_as_the_server(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    answer = server.client().chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=16)
    flags = ["--temperature=0", "--max-tokens=16", "--num-cache-blocks=64", "--device=cpu"]
    assert cli.main(["generate", str(MODEL), "What is a list?", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{answer.choices[0].message.content}\n"
    assert "16 tokens in" in captured.err and "ended by length" in captured.err


def test_the_metrics_say_which_model_is_served_and_by_whose_implementation(server: ServerProcess) -> None:
    about = {"architecture": "LlamaForCausalLM", "implementation": "gantline"}
    wait_until(lambda: server.metric("gantline_model_info", **about) == 1, what="the engine's first report")


def test_a_seed_decides_the_answer_and_each_choice_has_its_own(server: ServerProcess) -> None:
    def ask(seed: int) -> list[str]:
        answer = server.client().completions.create(model="tiny", prompt="The", seed=seed, n=3, max_tokens=8, temperature=1.5)
        return [choice.text for choice in answer.choices]

    first = ask(7)
    assert first == ask(7) and len(set(first)) > 1
    assert first[1] == ask(8)[0]


def test_logprobs_are_those_of_the_model(server: ServerProcess) -> None:
    answer = server.client().chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 6
    for entry in logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert entry.logprob == pytest.approx(values[0], abs=1e-4) and entry.token == entry.top_logprobs[0].token
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content


def test_a_repeated_prompt_is_read_from_the_cache(server: ServerProcess) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 20
    cached = [server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1}).json()["usage"] for _ in range(2)]
    assert cached[0]["prompt_tokens"] == cached[1]["prompt_tokens"] > 128
    assert cached[1]["prompt_tokens_details"]["cached_tokens"] >= cached[1]["prompt_tokens"] // 64 * 64 - 64
    wait_until(lambda: server.metric("gantline_prefix_cache_hits_total") > 0, what="the hit is counted")


def test_choices_of_one_prompt_read_it_together_and_say_what_one_alone_says(server: ServerProcess) -> None:
    before = server.metric("gantline_shared_prefix_tokens_total")
    ask: Any = {"model": "tiny", "prompt": [3 + i % 200 for i in range(700)], "temperature": 0, "max_tokens": 24}
    alone = server.client().completions.create(**ask).choices[0].text
    assert server.metric("gantline_shared_prefix_tokens_total") == before
    answer = server.client().completions.create(**ask, n=6)
    assert [choice.text for choice in answer.choices] == [alone] * 6
    wait_until(
        lambda: server.metric("gantline_shared_prefix_tokens_total") - before >= 2 * 640,
        what="the engine's report of what three choices read once in one step at least",
    )


def test_a_stop_string_cuts_the_answer_where_it_begins(server: ServerProcess) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 48}
    text = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:5]
    choice = server.post("/v1/chat/completions", {**body, "stop": stop}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_a_prompt_beyond_the_models_context_is_refused(server: ServerProcess) -> None:
    response = server.post("/v1/completions", {"prompt": "word " * 4000})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_a_client_that_leaves_frees_its_blocks(server: ServerProcess) -> None:
    body = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client, client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: server.metric("gantline_kv_cache_usage_perc") > 0, what="it holds blocks")
    wait_until(lambda: server.metric("gantline_kv_cache_usage_perc") == 0, what="the blocks are free")


def test_promise_and_reservation_of_memory_are_told(server: ServerProcess) -> None:
    for part in ("weights", "cache"):
        promised = server.metric("gantline_memory_promised_bytes", part=part)
        reserved = server.metric("gantline_memory_reserved_bytes", part=part)
        assert reserved == pytest.approx(promised, rel=0.03)
    held = server.metric("gantline_memory_reserved_bytes", part="context")
    assert 100e6 < held < server.metric("gantline_memory_promised_bytes", part="context"), "the process beside its weights"


def test_what_a_checkpoint_says_of_generating_is_honoured(server: ServerProcess, tmp_path: Path) -> None:
    """Its defaults for requests that say nothing, and every token of its list ends an answer."""
    folder = Path(shutil.copytree(MODEL, tmp_path / "changed"))
    free = server.post("/v1/completions", {"prompt": "A list is", "max_tokens": 12, "return_token_ids": True}).json()["choices"][0]
    assert free == server.post("/v1/completions", {"prompt": "A list is", "max_tokens": 12, "return_token_ids": True}).json()["choices"][0]
    ends = next(i for i, token in enumerate(free["token_ids"]) if i > 3 and token not in free["token_ids"][:i])
    settings = {"do_sample": True, "temperature": 1.9, "top_k": 1, "eos_token_id": [2, free["token_ids"][ends]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with running(folder, "--drain-delay=0", "--device=cpu", "--num-cache-blocks=64", program=REAL) as other:
        body = {"prompt": "A list is", "max_tokens": 12, "return_token_ids": True}
        answer = other.post("/v1/completions", body).json()["choices"][0]
        assert answer["token_ids"] == free["token_ids"][: ends + 1] and answer["finish_reason"] == "stop", "top_k 1 takes the likeliest"
        spoken = [other.post("/v1/completions", {**body, "top_k": 0, "seed": seed}).json()["choices"][0]["token_ids"] for seed in range(3)]
        assert any(ids != answer["token_ids"] for ids in spoken), "the request's top_k wins, and its temperature is the checkpoint's"
        assert other.post("/v1/completions", {**body, "ignore_eos": True}).json()["choices"][0]["token_ids"] == free["token_ids"]


def test_a_folder_that_is_no_model_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    server = ServerProcess(tmp_path / "m", program=REAL)
    assert server.wait_exit() == 65
    assert server.termination["reason"] in ("NotAModel", "InvalidCheckpoint") and server.termination["cure"]
