"""The gateway's part of the rehearsal: two of them, one address, limits that they share, and streams that outlive each of them."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scripts.rehearsal.cluster import GATEWAYS, NAMESPACE, Rehearsal, RehearsalFailed
from tests.e2e.streams import Streams

__all__ = ["KEY", "drain", "limits_are_split", "offer_keys", "share", "streams"]

Object = dict[str, Any]
KEY = "gl-rehearsal-key-0123456789"
LIMITED = "gl-limited-key-0123456789"
PER_MINUTE = 240
"""Tokens of the limited key. A request of theirs takes more than half of one gateway's half."""
LONG = 100


def offer_keys(rehearsal: Rehearsal) -> None:
    """A Secret of API keys, which counts once gateways ask for keys."""
    metadata = {"name": "rehearsal", "namespace": NAMESPACE, "labels": {"gantline.io/api-keys": "true"}}
    keys = {"all": KEY, "limited": f"{LIMITED} tokens-per-minute={PER_MINUTE}"}
    rehearsal.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys})


def address(rehearsal: Rehearsal) -> str:
    return f"http://127.0.0.1:{rehearsal.cluster.expose(f'{NAMESPACE}/gantline-gateway:80')}"


@contextmanager
def streams(rehearsal: Rehearsal, count: int, tokens: int) -> Iterator[Streams]:
    """Clients that stream through the gateway meanwhile. Raises RehearsalFailed unless every answer ended as it should."""
    with Streams(address(rehearsal), count, tokens, api_key=KEY) as running:
        yield running
    ends = Counter(stream.how for stream in running.ended)
    longest = max((stream.first_text_s for stream in running.ended), default=0.0)
    print(f"  {len(running.ended)} streams, the longest waited {longest:.1f} s for its first text", flush=True)
    if set(ends) != {"length"}:
        raise RehearsalFailed(f"streams ended otherwise than they should: {dict(ends)}")


def gateways(rehearsal: Rehearsal) -> list[str]:
    """Names of those that take requests."""
    return [
        pod["metadata"]["name"]
        for pod in rehearsal.pods(GATEWAYS, NAMESPACE)
        if "deletionTimestamp" not in pod["metadata"]
        and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
    ]


def none_is_leaving(rehearsal: Rehearsal) -> bool:
    return not [pod for pod in rehearsal.pods(GATEWAYS, NAMESPACE) if "deletionTimestamp" in pod["metadata"]]


def metric(rehearsal: Rehearsal, gateway: str, name: str, **labels: str) -> float:
    """The sum of a metric's series that have these labels; 0 where it has none yet."""
    text = rehearsal.run("kubectl", "get", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{gateway}:8081/proxy/metrics")
    lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.M)
    return sum(float(value) for found, value in lines if all(f'{label}="{wanted}"' in found for label, wanted in labels.items()))


def share(rehearsal: Rehearsal) -> None:
    """Two, each of which knows of the other, and both of which answer who asks the one address."""
    rehearsal.until("two gateways are ready", lambda: len(gateways(rehearsal)) == 2 and none_is_leaving(rehearsal))
    names = gateways(rehearsal)
    rehearsal.until("each counts two", lambda: [metric(rehearsal, name, "gantline_gateway_sharing") for name in names] == [2.0, 2.0])
    answered: dict[str, float] = {}

    def both_answered() -> bool:
        if ask(rehearsal, KEY, tokens=2) != 200:
            raise RehearsalFailed("the gateways' address does not answer")
        answered.update({name: metric(rehearsal, name, "gantline_gateway_requests_total", outcome="ok") for name in names})
        return all(answered.values())

    rehearsal.until("both have answered", both_answered, timeout_s=120)
    print(f"  answered: {sorted(answered.values())}", flush=True)


def ask(rehearsal: Rehearsal, key: str, tokens: int) -> int:
    """The status of one answer, over a connection of its own, so that any of the gateways may get it."""
    body = {"model": "chat", "prompt": "The licence", "max_tokens": tokens, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "Connection": "close"}
    request = urllib.request.Request(f"{address(rehearsal)}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def limits_are_split(rehearsal: Rehearsal) -> None:
    """Each gateway gives one of the requests of which a single one would give two, and then refuses."""
    share(rehearsal)
    names = gateways(rehearsal)
    if ask(rehearsal, "gl-wrong-key-0123456789", tokens=2) != 401:
        raise RehearsalFailed("a wrong key is not refused")
    given: Counter[int] = Counter()

    def both_refuse() -> bool:
        given[ask(rehearsal, LIMITED, tokens=LONG)] += 1
        refusals = [metric(rehearsal, name, "gantline_gateway_key_limited_total", key="rehearsal/limited") for name in names]
        return all(refusals)

    rehearsal.until("both have refused the key that used its share", both_refuse, timeout_s=60)
    if set(given) != {200, 429} or given[200] != len(names):
        raise RehearsalFailed(f"of {PER_MINUTE} tokens a minute two gateways gave {LONG} each time: {dict(given)}")
    print(f"  answers by status: {dict(given)}", flush=True)


def drain(rehearsal: Rehearsal) -> None:
    """One of two gateways is deleted while it has streams: they end as they should, and a successor takes its place."""
    with streams(rehearsal, 6, tokens=400):
        busy: dict[str, float] = {}

        def one_is_busy() -> bool:
            busy.update({name: metric(rehearsal, name, "gantline_gateway_running") for name in gateways(rehearsal)})
            return max(busy.values()) >= 2

        rehearsal.until("a gateway has streams", one_is_busy)
        leaving = max(busy, key=lambda name: busy[name])
        command = ["kubectl", "logs", "--follow", f"pod/{leaving}", "-n", NAMESPACE]
        with subprocess.Popen(command, env=rehearsal.environment, stdout=subprocess.PIPE, text=True) as log:
            rehearsal.run("kubectl", "delete", f"pod/{leaving}", "-n", NAMESPACE, "--wait=true", "--timeout=3m")
            written = log.communicate(timeout=60)[0]
    said = {entry["message"]: entry for line in written.splitlines() if line.startswith("{") and (entry := json.loads(line))}
    if not said.get("draining", {}).get("running") or said.get("drained", {}).get("unfinished") != 0:
        raise RehearsalFailed(f"{leaving} did not say that it drained with streams running:\n{written[-3000:]}")
    print(f"  {said['draining']['running']} streams ended in its {said['drained']['seconds']} s", flush=True)
    share(rehearsal)
