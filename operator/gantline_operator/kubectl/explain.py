"""Why a service is as it is, in sentences: its conditions, the plan and what was turned down, its pods' troubles, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from gantline_operator.client import Object
from gantline_operator.kubectl.reading import Reader, age, columns
from gantline_operator.pod_state import PodState, read_pod
from gantline_operator.reasons import look_up

__all__ = ["explain", "report"]

_MOST_REJECTED = 12
_GOOD_WHEN_FALSE = ("Progressing", "Degraded")


async def report(reader: Reader, name: str, now: datetime) -> str:
    """Raises SourceError."""
    service = await reader.service(name)
    pods = [read_pod(pod) for pod in await reader.pods(name)]
    return "\n".join([*explain(service, pods, now), *reader.missing])


def explain(service: Object, pods: Sequence[PodState], now: datetime) -> list[str]:
    """Lines of text."""
    status: Mapping[str, Any] = service.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    title = f"{service['metadata']['namespace']}/{service['metadata']['name']}"
    if "Ready" not in conditions:
        return [
            f"{title}: no operator has looked at it yet.",
            "Next: see that one runs and serves this namespace (its chart's watchNamespaces); it looks at a new service at once.",
        ]
    return [
        *_summary(title, service, status, conditions),
        *_standing_in_the_way(conditions),
        *_plan(status),
        *_stages(status),
        *_pods(pods, now),
        *_next(conditions),
    ]


def _summary(title: str, service: Object, status: Mapping[str, Any], conditions: Mapping[str, Any]) -> Iterable[str]:
    ready = conditions["Ready"]
    wanted = (service.get("spec") or {}).get("replicas", 1)
    if ready["status"] == "True":
        yield f"{title} is ready: {status.get('readyReplicas', 0)} of {wanted} replicas answer at {status.get('url', 'its Service')}."
    else:
        row = look_up(ready["reason"])
        yield f"{title} is not ready ({ready['reason']}): {row.means if row else 'a reason that this release does not know'}."
    if status.get("observedGeneration", 0) < service["metadata"].get("generation", 0):
        yield "The operator has not looked at the newest spec yet; what follows is about the one before."
    if ready["status"] != "True" and conditions.get("Servable", {}).get("status") == "True":
        yield f"Meanwhile {status.get('readyReplicas', 0)} of {wanted} replicas answer at {status.get('url', 'its Service')}."


def _standing_in_the_way(conditions: Mapping[str, Any]) -> Iterable[str]:
    """What is not as it should be, each message once."""
    told: set[str] = set()
    for kind, item in conditions.items():
        bad = item["status"] == "True" if kind == "Degraded" else item["status"] != "True" and kind not in _GOOD_WHEN_FALSE
        text = item.get("message") or item["reason"]
        if bad and text not in told:
            told.add(text)
            yield f"{kind}: {text}"


def _plan(status: Mapping[str, Any]) -> Iterable[str]:
    plan: Mapping[str, Any] = status.get("plan") or {}
    if plan.get("precision"):
        where = f"{plan.get('count')} x {plan.get('product') or plan.get('resource')}" if plan.get("resource") else "a CPU"
        made = ", which a Job makes first," if plan.get("quantize") else ""
        yield (
            f"Plan: {plan['precision']}{made} on {where} for each replica, backend {plan.get('backend')}, tensor parallelism "
            f"{plan.get('tensorParallel')}, sessions of up to {plan.get('sessionLen')} tokens, "
            f"about {plan.get('loadSeconds')} s from container to ready."
        )
    rejected = plan.get("rejected") or []
    if rejected:
        yield "Turned down:"
        rows = [(f"  {row['option']}", row["reason"], row.get("message", "")) for row in rejected[:_MOST_REJECTED]]
        yield from columns(("", "", ""), rows).splitlines()[1:]
        if len(rejected) > _MOST_REJECTED:
            yield f"  and {len(rejected) - _MOST_REJECTED} more, in status.plan.rejected"


def _stages(status: Mapping[str, Any]) -> Iterable[str]:
    for stage in status.get("stages") or []:
        if stage.get("state") == "Running":
            progress = f": {stage['progress']}" if stage.get("progress") else ""
            yield f"At work: {stage['name']}, Job {stage.get('job', '')}{progress}. Its log: kubectl logs job/{stage.get('job', '')}"


def _pods(pods: Sequence[PodState], now: datetime) -> Iterable[str]:
    for pod in sorted(pods, key=lambda pod: pod.created):
        if pod.trouble is not None and not pod.deleting:
            place = f" on {pod.node}" if pod.node else ""
            starts = f", started {pod.restarts + 1} times" if pod.restarts else ""
            yield f"Pod {pod.name}{place} ({age(pod.created, now)} old{starts}): {pod.trouble.reason}: {pod.trouble.text}"


def _next(conditions: Mapping[str, Any]) -> Iterable[str]:
    """What to do about the reason of Ready; where it is ready, about what is degraded all the same."""
    if conditions["Ready"]["status"] != "True":
        wrong = conditions["Ready"]
    elif "Degraded" in conditions and conditions["Degraded"]["status"] == "True":
        wrong = conditions["Degraded"]
    else:
        return
    if (row := look_up(wrong["reason"])) is not None:
        yield f"Next: {row.cure}."
