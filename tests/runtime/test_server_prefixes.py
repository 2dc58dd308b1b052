"""GET /internal/prefixes: what the cache holds, told in the hashes that a gateway makes of requests, as it comes and goes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gantline_runtime.engine_messages import PrefixChanges
from gantline_runtime.prompt_prefixes import SCHEME, CachedPrefixes, first_prefixes
from gantline_runtime.server.key_lines import describe_key
from gantline_runtime.server.prefix_directory import PrefixDirectory

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, running, wait_until

KEYS = {"gateway": "g" * 20, "alice": "a" * 20}


def _chat(system: str, user: str = "abc") -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system * 1500}, {"role": "user", "content": user}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Whose cache holds three of the long prompts, behind two API workers that take connections in turns."""
    folder = tmp_path_factory.mktemp("prefixes")
    (folder / "keys").write_text("".join(describe_key(name, key) + " internal" * (name == "gateway") + "\n" for name, key in KEYS.items()))
    model = write_model(folder / "echo", num_cache_blocks=80)
    with running(model, "--drain-delay=0", "--api-workers=2", "--max-batch-size=2", f"--api-keys={folder / 'keys'}") as server:
        yield server


def _get(server: ServerProcess, since: str = "", key: str = "gateway") -> Any:
    headers = {"Authorization": f"Bearer {KEYS[key]}", "Connection": "close"}  # the next request may reach the other worker
    return server.get("/internal/prefixes", params={"since": since}, headers=headers)


def _ask(server: ServerProcess, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    assert server.post(path, body, headers={"Authorization": f"Bearer {KEYS['alice']}"}).status_code == 200


class Follower:
    """What a gateway keeps of one replica."""

    def __init__(self, server: ServerProcess) -> None:
        self._server, self._cursor, self.present = server, "", set[int]()
        self.num_whole = 0

    def poll(self) -> None:
        answer = _get(self._server, self._cursor).json()
        assert answer["scheme"] == SCHEME
        if answer["whole"]:
            self.present = set()
            self.num_whole += 1
        self.present |= set(answer["added"])
        self.present -= set(answer["removed"])
        self._cursor = answer["cursor"]

    def holds(self, body: dict[str, Any]) -> float:
        """Share of a body's cuts that are told of."""
        self.poll()
        hashes = first_prefixes(json.dumps(body).encode()).hashes
        return sum(name in self.present for name in hashes) / len(hashes)


def test_prompts_are_told_of_while_their_blocks_are_cached_and_all_workers_agree(server: ServerProcess) -> None:
    follower = Follower(server)
    first, tokens = _chat("a"), {"prompt": [7] * 1400, "max_tokens": 2}
    assert follower.holds(first) == 0
    _ask(server, first)
    wait_until(lambda: follower.holds(first) == 1.0, what="the prompt in the cache")
    assert follower.holds(_chat("a", "something else")) == 1.0 and follower.holds(tokens) == 0
    for other in (_chat("b"), _chat("c"), tokens, _chat("d")):
        _ask(server, other)
        wait_until(lambda other=other: follower.holds(other) == 1.0, what="the next prompt in the cache")
    assert follower.holds(first) < 0.2  # evicted from its end on
    assert follower.num_whole == 1
    wait_until(lambda: len({tuple(sorted(_get(server).json()["added"])) for _ in range(8)}) == 1, what="the same of every worker")
    assert set(_get(server).json()["added"]) == follower.present


def test_only_keys_that_are_internal_may_read_what_concerns_all_callers(server: ServerProcess) -> None:
    refused = _get(server, key="alice")
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_internal"
    assert server.get("/internal/prefixes").status_code == 401
    for cursor in ("nonsense", "9.9", ".", "..", "\u0661.\u0661", "x" * 5000):
        assert _get(server, cursor).json()["whole"], cursor


def _changes(number: int, added: list[int], removed: list[int] | None = None, **more: Any) -> PrefixChanges:
    return PrefixChanges(epoch="e", number=number, added=added, removed=removed or [], **more)


def test_who_missed_too_much_or_another_start_gets_the_whole_and_others_what_changed() -> None:
    directory = PrefixDirectory()
    assert directory.since("").whole and not directory.since("").added
    directory.apply(_changes(3, [1, 2], whole=True))
    directory.apply(_changes(4, [3], [1]))
    directory.apply(_changes(5, [1, 4], [2]))
    assert directory.since("e.3") == CachedPrefixes(SCHEME, "e.5", False, [3, 1, 4], [2])
    assert directory.since("e.4") == CachedPrefixes(SCHEME, "e.5", False, [1, 4], [2])
    assert directory.since("e.6") == CachedPrefixes(SCHEME, "e.6", False, [], [])
    for cursor in ("e.2", "other.5", "", "e.", "e.-1"):
        assert directory.since(cursor) == CachedPrefixes(SCHEME, "e.5", True, [1, 3, 4], [])
    for number in range(6, 60):
        directory.apply(
            _changes(number, list(range(number * 1000, number * 1000 + 1000)), list(range(number * 1000 - 1000, number * 1000)))
        )
    assert directory.since("e.5").whole and len(directory.since("e.5").added) == 1003
    assert not directory.since("e.50").whole
