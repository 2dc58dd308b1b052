"""Whatever is asked, there is an answer or an error with its cause, soon, and the server goes on with nothing lost.

GANTLINE_FUZZ=10000 makes the walk longer than the suite can afford; its last run is recorded in docs/perf-log.md.
"""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.runtime.fuzzing import BODIES, CONSTRAINED, GARBAGE, mutated_request
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import REAL, ROOT, ServerProcess, events, running, wait_until

COUNT = int(os.environ.get("GANTLINE_FUZZ", "2400"))
SEED = int(os.environ.get("GANTLINE_FUZZ_SEED", "20261125"))
TINY = ROOT / "examples" / "tiny-model"
WORKERS = 4
LIMIT_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("fuzz") / "echo", session_len=200)
    with running(model, "--drain-delay=0", "--max-body-bytes=65536") as server:
        yield server


def _ask(server: ServerProcess, client: httpx.Client, rng: random.Random, tally: Counter[str], bodies: Any = BODIES) -> None:
    path, body, headers = mutated_request(rng, bodies)
    response = client.post(server.url + path, content=body, headers=headers)
    context = f"{path} {body[:2000]!r}\n{response.status_code} {response.text[:500]}"
    may_expire = b'"timeout"' in body
    assert response.status_code in (200, 400, 404, 413, 415, 429, *([504] if may_expire else [])), context
    if response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"):
        assert may_expire or not any("error" in event for event in events(response.text)), context
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"], context
        tally[error["code"]] += 1
    tally[str(response.status_code)] += 1


def _walk(server: ServerProcess, count: int, seed: int) -> Counter[str]:
    tally: Counter[str] = Counter()
    rng = random.Random(seed)
    with httpx.Client(timeout=LIMIT_S) as client:
        for _ in range(count):
            _ask(server, client, rng, tally)
    return tally


def test_mutated_requests_get_an_answer_or_an_error_and_never_harm_the_server(server: ServerProcess) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        tallies = list(pool.map(lambda i: _walk(server, COUNT // WORKERS, SEED + i), range(WORKERS)))
    total: Counter[str] = sum(tallies, Counter())
    print(f"{COUNT} mutated requests: {dict(total.most_common())}")
    assert total["200"] > COUNT // 20 and total["400"] > COUNT // 4, "the walk met both sides"
    assert {"invalid_json", "invalid_value", "missing_parameter", "unknown_parameter", "unsupported_parameter"} <= total.keys()
    _assert_sound(server)


def _assert_sound(server: ServerProcess) -> None:
    assert server.process.poll() is None and server.get("/health").status_code == 200
    assert server.post("/v1/completions", {"prompt": "ab", "max_tokens": 1}).status_code == 200
    wait_until(lambda: server.metric("gantline_kv_cache_usage_perc") == 0, what="every block is free")
    wait_until(lambda: server.metric("gantline_num_requests_running") == 0, what="nothing runs")
    assert not [line for line in server.logs if line["level"] == "error"] and not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_not_http_is_refused_and_the_server_goes_on(server: ServerProcess, garbage: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505", b"HTTP/1.1 200"))
    assert server.get("/health").status_code == 200


# ---- the engine, with a model


_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1e-30, 1e-6, 0.5, 1, 2),
    "top_p": (0, 1e-30, 0.1, 1),
    "top_k": (-1, 0, 1, 5, 1 << 20),
    "min_p": (0, 1e-30, 0.5, 1),
    "repetition_penalty": (0.01, 1, 10),
    "presence_penalty": (-2, 0, 2),
    "frequency_penalty": (-2, 0, 2),
    "logit_bias": ({}, {"0": -100, "1": 100}, {str(i): -100 for i in range(2000)}),
    "seed": (None, 0, -(1 << 63), (1 << 63) - 1),
    "stop_token_ids": ([], [0, 1, 2], list(range(1024))),
    "min_tokens": (0, 1, 3),
    "bad_words": ([], ["a", " the", "the quick brown"], ["e"] * 256),
    "logprobs": (None, 0, 20),
    "ignore_eos": (True, False),
    "skip_special_tokens": (True, False),
    "stop": ([], ["a"], ["e " * 4000] * 8, ["\n", "the"]),
    "echo": (True, False),
    "n": (1, 3),
    "include_stop_str_in_output": (True, False),
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[ServerProcess]:
    if not (TINY / "model.safetensors").exists():
        pytest.skip("the shipped model is not here")
    with running(TINY, "--device=cpu", "--num-cache-blocks=64", "--drain-delay=0", program=REAL) as server:
        yield server


def test_any_legal_sampling_parameters_give_an_answer_of_the_real_engine(tiny: ServerProcess) -> None:
    rng = random.Random(SEED)
    for _ in range(max(60, COUNT // 40)):
        fields = {name: rng.choice(values) for name, values in _SAMPLING.items() if rng.random() < 0.5}
        prompt = rng.choice(["The quick", "\x00", "é😀", [1], [rng.randrange(4000) for _ in range(100)]])
        response = tiny.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, **fields})
        assert response.status_code == 200, (fields, response.text)
        logprobs = response.json()["choices"][0]["logprobs"]
        values = [value for value in (logprobs or {}).get("token_logprobs", []) if value is not None]
        assert all(-9999 <= value <= 1e-3 for value in values), fields
    _assert_sound(tiny)


def test_mutated_tools_and_schemas_do_not_harm_the_real_engine(tiny: ServerProcess) -> None:
    rng, tally = random.Random(SEED), Counter[str]()
    with httpx.Client(timeout=60) as client:
        for _ in range(max(60, COUNT // 40)):
            _ask(tiny, client, rng, tally, {"/v1/chat/completions": CONSTRAINED})
    print(f"{max(60, COUNT // 40)} mutated grammars: {dict(tally.most_common())}")
    assert tally["200"] > 5 and tally["400"] > 5
    _assert_sound(tiny)
