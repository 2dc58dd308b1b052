"""How busy services are: each replica's own /metrics, read through the API server's pod proxy, summed over a service.

Tokens a second need two looks. Who may not use the proxy (`get` of `pods/proxy`) still sees replicas and reasons, and is told why no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from gantline_operator.client import ApiError, Forbidden, Object
from gantline_operator.kubectl.reading import Reader, columns
from gantline_operator.observe import PODS

__all__ = ["Sample", "read_metrics", "report"]

_AT_ONCE = 16
_MOST_SILENT = 5
_RUNNING, _WAITING, _CACHE = "gantline_num_requests_running", "gantline_num_requests_waiting", "gantline_kv_cache_usage_perc"
_TOKENS = "gantline_generation_tokens_total"
_NO_PROXY = (
    "You may not reach pods through the API server (`get` of `pods/proxy`), so their load is not known. Ask for that right, or look at one "
    "pod with `kubectl port-forward POD 8000` and `curl localhost:8000/metrics`."
)


@dataclass(frozen=True)
class Sample:
    """One look at one replica."""

    at: float
    """Seconds of a monotonic clock."""
    running: float
    waiting: float
    cache: float
    """Share of the KV cache in use, 0 to 1."""
    tokens: float
    """Generated since its start."""


def read_metrics(text: str, at: float) -> Sample | None:
    """None where it is not our engine's."""
    values: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            values |= {sample.name: sample.value for sample in family.samples if not sample.labels}
    except ValueError:
        return None
    if not {_RUNNING, _WAITING, _CACHE, _TOKENS} <= values.keys():
        return None
    return Sample(at, values[_RUNNING], values[_WAITING], values[_CACHE], values[_TOKENS])


async def report(reader: Reader, names: Collection[str], interval_s: float) -> str:
    """A table, a row for each service. Raises SourceError."""
    wanted = [await reader.service(name) for name in names] if names and reader.namespace else await reader.services()
    services = [item for item in wanted if not names or item["metadata"]["name"] in names]
    if not services:
        return "There are no InferenceServices here."
    pods = [pod for pod in await reader.pods() if _ready_server(pod)]
    looked = _Looking(reader)
    first = await looked.at(pods)
    second: Mapping[str, Sample] = {}
    if first:
        await asyncio.sleep(interval_s)
        second = await looked.at(pods)
    rows = [_row(item, _of(item, pods), first, second, reader.namespace is None) for item in services]
    head = ("SERVICE", "REPLICAS", "RUNNING", "WAITING", "TOKENS/S", "KV CACHE", "REASON")
    return "\n".join([columns(head, rows), *reader.missing, *looked.troubles])


class _Looking:
    """Asks pods for their metrics, and remembers what stood in the way."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._silent: dict[str, str] = {}
        self._refused = False

    @property
    def troubles(self) -> list[str]:
        silent = [f"Pod {name} does not answer: {why}" for name, why in sorted(self._silent.items())]
        more = [f"... and {len(silent) - _MOST_SILENT} more pods."] if len(silent) > _MOST_SILENT else []
        return [*([_NO_PROXY] if self._refused else []), *silent[:_MOST_SILENT], *more]

    async def at(self, pods: Sequence[Object]) -> dict[str, Sample]:
        """By the pod's uid."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def ask(pod: Object) -> Sample | None:
            async with gate:
                return None if self._refused else await self._ask(pod)

        answers = await asyncio.gather(*map(ask, pods))
        return {pod["metadata"]["uid"]: answer for pod, answer in zip(pods, answers, strict=True) if answer is not None}

    async def _ask(self, pod: Object) -> Sample | None:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        try:
            text = await self._reader.client.text(PODS, namespace, f"{name}:{_port(pod)}", "proxy/metrics")
        except Forbidden as error:
            if error.reason == "Forbidden":  # the API server's own word; a pod that refuses has no reason of its
                self._refused = True
                return None
            self._silent[name] = str(error)[:200]
            return None
        except ApiError as error:
            self._silent[name] = str(error)[:200]
            return None
        sample = read_metrics(text, time.monotonic())
        if sample is None:
            self._silent[name] = "what it says is no metrics of Gantline's runtime"
        return sample


def _ready_server(pod: Object) -> bool:
    labels = pod["metadata"].get("labels") or {}
    conditions = (pod.get("status") or {}).get("conditions") or []
    ready = any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)
    return labels.get("gantline.io/role") == "server" and ready and "deletionTimestamp" not in pod["metadata"]


def _port(pod: Object) -> int:
    ports = (port for container in pod["spec"].get("containers") or [] for port in container.get("ports") or [])
    return next((int(port["containerPort"]) for port in ports if port.get("name") == "http"), 8000)


def _of(service: Object, pods: Iterable[Object]) -> list[str]:
    """uids of its pods."""
    metadata = service["metadata"]
    return [
        pod["metadata"]["uid"]
        for pod in pods
        if (pod["metadata"]["namespace"], pod["metadata"]["labels"].get("gantline.io/service")) == (metadata["namespace"], metadata["name"])
    ]


def _row(
    service: Object, uids: Sequence[str], first: Mapping[str, Sample], second: Mapping[str, Sample], named: bool
) -> tuple[str, str, str, str, str, str, str]:
    metadata, status = service["metadata"], service.get("status") or {}
    name = f"{metadata['namespace']}/{metadata['name']}" if named else metadata["name"]
    wanted = (service.get("spec") or {}).get("replicas", 1)
    conditions: dict[str, Any] = {item["type"]: item for item in status.get("conditions") or []}
    reason = str(conditions.get("Ready", {}).get("reason", "no operator has looked at it"))
    latest = [second[uid] for uid in uids if uid in second]
    pairs = [(first[uid], second[uid]) for uid in uids if uid in first and uid in second]
    return (
        name,
        f"{status.get('readyReplicas', 0)}/{wanted}",
        f"{sum(item.running for item in latest):.0f}" if latest else "-",
        f"{sum(item.waiting for item in latest):.0f}" if latest else "-",
        f"{sum(_rate(*pair) for pair in pairs):.1f}" if pairs else "-",
        f"{sum(item.cache for item in latest) / len(latest):.0%}" if latest else "-",
        reason,
    )


def _rate(before: Sample, after: Sample) -> float:
    """Tokens a second; a counter that went back is a replica that started anew."""
    seconds, tokens = after.at - before.at, after.tokens - before.tokens
    return tokens / seconds if seconds > 0 and tokens >= 0 else 0.0
