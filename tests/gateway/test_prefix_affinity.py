"""Prompts go where their beginning is cached: by what the replicas tell of it, through a real gateway, on real servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from gantline_gateway.catalog import Service
from gantline_gateway.prefixes import EXPECTED_S, MOST_EXPECTED, PrefixIndex, is_costly, name_replica
from gantline_runtime.prompt_prefixes import MOST_TOLD, SCHEME, CachedPrefixes, first_prefixes

from benchmarks.prefix_routing import Setting, make_requests, send, turns
from tests.gateway.gateway_process import GatewayProcess, gateway, write_services
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, read_metric, running, wait_until

SETTING = Setting(replicas=2, prefixes=24, cached=14, requests=150, clients=4, token_us=0.0)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    """Two servers, each with room for 14 of the prefixes."""
    model = write_model(tmp_path_factory.mktemp("affinity") / "shared", num_cache_blocks=SETTING.blocks)
    flags = ("--drain-delay=0", "--max-batch-size=4")
    with running(model, *flags) as one, running(model, *flags) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def before(replicas: list[ServerProcess], tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    file = tmp_path_factory.mktemp("services") / "services.json"
    with gateway(write_services(file, {"name": "shared", "replicas": [server.url for server in replicas]})) as process:
        yield process


def _num_polls(server: ServerProcess) -> float:
    return read_metric(server.get("/metrics").text, "gantline_http_requests_total", 0.0, route="/internal/prefixes")


def _hashes(body: Any) -> set[int]:
    return set(first_prefixes(json.dumps(body).encode()).hashes)


def _told_by(server: ServerProcess) -> set[int]:
    return set(server.get("/internal/prefixes").json()["added"])


def _cached_share(answer: Any) -> float:
    usage = answer.json()["usage"]
    return float(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])


def test_what_a_replica_has_read_without_the_gateway_draws_its_prompts_there(before: GatewayProcess, replicas: list[ServerProcess]) -> None:
    """By chance alone, all eight would find their replica once in 256 times."""
    bodies = make_requests(Setting(prefixes=10, requests=40), seed=9)
    distinct = list({body["messages"][0]["content"]: body for body in bodies}.values())[:8]
    for number, body in enumerate(distinct):
        server = replicas[number % 2]
        server.post("/v1/chat/completions", body)
        wait_until(lambda body=body, server=server: _hashes(body) <= _told_by(server), what="what the replica tells")  # type: ignore[misc]
    before.post("/v1/chat/completions", {"model": "shared", "messages": [{"role": "user", "content": "Who is there?"}]})
    polls = [_num_polls(server) for server in replicas]
    wait_until(lambda: all(_num_polls(server) >= count + 2 for server, count in zip(replicas, polls, strict=True)), what="two rounds")
    shares = [_cached_share(before.post("/v1/chat/completions", body)) for body in distinct]
    assert len(shares) == 8 and min(shares) > 0.8


def test_more_of_many_prompts_is_cached_than_if_they_went_to_the_replicas_in_turns(
    before: GatewayProcess, replicas: list[ServerProcess]
) -> None:
    requests = make_requests(SETTING)
    in_turns = asyncio.run(send(requests, turns([server.url for server in replicas]), SETTING.clients))
    routed = asyncio.run(send(requests, lambda: before.url, SETTING.clients))
    assert routed.hit_rate > 1.2 * in_turns.hit_rate > 0, (routed, in_turns)


def _told(added: list[int], removed: list[int] | None = None, *, whole: bool = False) -> CachedPrefixes:
    return CachedPrefixes(SCHEME, "cursor", whole, added, removed or [])


def test_a_replica_holds_what_it_told_and_for_a_while_what_it_was_given() -> None:
    now = 0.0
    index, a = PrefixIndex(lambda: now), name_replica(Service("default", "s"), "a")
    assert (index.count(a, [1, 2, 3]), index.cursor(a)) == (0, "")
    index.take(a, _told([1, 2], whole=True))
    assert (index.count(a, [1, 2, 3]), index.cursor(a)) == (2, "cursor")
    index.take(a, _told([3], [1, 2]))
    assert index.count(a, [3]) == 1 and index.count(a, [1, 2]) == 0
    index.expect(a, [7, 8])
    assert index.count(a, [7, 8, 9]) == 2
    now = EXPECTED_S
    assert index.count(a, [7, 8, 9]) == 0 and index.count(a, [3]) == 1
    index.expect(a, list(range(100, 100 + MOST_EXPECTED + 5)))
    assert index.count(a, [104]) == 0 and index.count(a, [105]) == 1
    index.take(a, _told(list(range(2 * MOST_TOLD + 1))))
    assert index.count(a, [3]) == 0 and index.cursor(a) == "", "it is asked for the whole again"
    index.take(a, _told([3]))
    index.forget_all_but([])
    assert index.count(a, [3]) == 0


def test_bodies_of_very_many_values_are_not_looked_into() -> None:
    """8 MB of text take 10 ms; of the others each took 70 ms to 3 s on the event loop."""
    part = {"type": "text", "text": "ab"}
    text = json.dumps({"messages": [{"role": "user", "content": 'He said: "1, 2, {3}".\n' * 300_000}]}).encode()
    looked_into = [text, json.dumps({"prompt": list(range(100_000))}).encode(), b'{"prompt": [1, 2]}']
    left_alone = [
        json.dumps({"prompt": [1] * 2_000_000}).encode(),
        json.dumps({"messages": [{}] * 1_000_000}).encode(),
        json.dumps({"messages": [{"role": "user", "content": [part] * 60}] * 1000}).encode(),
    ]
    assert [is_costly(body) for body in looked_into + left_alone] == [False] * 3 + [True] * 3
    assert len(first_prefixes(text).hashes) > 60 and not first_prefixes(left_alone[1]).hashes
