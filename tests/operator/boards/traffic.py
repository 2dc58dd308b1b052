"""Clients of the gateway: calm, a rush, calm again, with one service asleep, mistakes, a limited key, and clients that leave."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from tests.operator.boards.installation import KEYS

__all__ = ["CALM_S", "RUSH_S", "keep_busy"]

CALM_S, RUSH_S = 60.0, 90.0
_QUESTION = "Tell me in a few plain words what you know of this, and why it is so. "


class _Client:
    """Asks until told to end. Answers of any status are what the dashboards are to show."""

    def __init__(self, url: str, key: str, number: int) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEYS[key]}"}, timeout=120)
        self._draws = random.Random(number)

    def ask(self, model: str) -> None:
        subject = self._draws.choice(("lists", "rain", "numbers", "a house"))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": _QUESTION * self._draws.randint(1, 4) + subject}],
            "max_tokens": self._draws.choice((8, 40, 120)),
            "stream": True,
        }
        if self._draws.random() < 0.1:
            body["temperature"] = -1
        with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            leaves = answer.status_code == 200 and self._draws.random() < 0.05
            for _ in answer.iter_lines():
                if leaves:
                    return
        if answer.status_code != 200:
            time.sleep(0.5)


@contextmanager
def _clients(url: str, model: str, **numbers: int) -> Iterator[None]:
    """So many for each key, while entered."""
    over = threading.Event()

    def work(client: _Client) -> None:
        while not over.is_set():
            try:
                client.ask(model)
            except httpx.HTTPError:
                time.sleep(0.5)
            over.wait(0.2)

    clients = [_Client(url, key, number) for key, count in numbers.items() for number in range(count)]
    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def keep_busy(url: str, during_the_rush: Callable[[], None]) -> None:
    """`during_the_rush` is called in its middle."""
    with _clients(url, "chat", search=2), _clients(url, "summaries", reports=1):
        time.sleep(CALM_S)
        with _clients(url, "chat", search=12, reports=2), _clients(url, "nightly", search=1), _clients(url, "unheard-of", search=1):
            time.sleep(RUSH_S / 2)
            during_the_rush()
            time.sleep(RUSH_S / 2)
        time.sleep(CALM_S)
