"""Events on an InferenceService: transitions only, so that `kubectl describe` tells a story instead of repeating a state.

`transitions` compares two statuses; what it finds is sent once. An event that cannot be sent is logged and forgotten: the status has it.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from gantline_operator.client import FIELD_MANAGER, ApiError, Client, Object, Resource
from gantline_operator.conditions import EventReason, Reason

__all__ = ["EVENTS", "Event", "send", "transitions"]

EVENTS = Resource("events.k8s.io/v1", "Event", "events")

_log = logging.getLogger(__name__)

_QUIET = {
    # What is under way, or waits for what is: no news, and no warning.
    Reason.INSPECTING, Reason.FETCHING, Reason.QUANTIZING, Reason.EVICTING, Reason.WAITING_FOR_MODEL, Reason.ROLLING_OUT,
    Reason.STARTING, Reason.NOT_AVAILABLE, Reason.SUSPENDED, Reason.PAUSED, Reason.SCALED_TO_ZERO, Reason.RETRYING,
    Reason.HANDING_OVER,
}  # fmt: skip
_TELLING = ("ModelReady", "PlanResolved", "QuantizationReady", "Scheduled", "ScalingReady", "Degraded")
_SUCCEEDED = {
    "PlanResolved": EventReason.PLANNED,
    "ModelReady": EventReason.MODEL_INSPECTED,
    "QuantizationReady": EventReason.QUANTIZATION_SUCCEEDED,
    "Ready": EventReason.ROLLOUT_COMPLETED,
}


@dataclass(frozen=True)
class Event:
    type: Literal["Normal", "Warning"]
    reason: str
    note: str
    action: str = "Reconcile"


def transitions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Event]:
    """What happened between two statuses, told in the order in which a service comes to life."""
    old = {item["type"]: item for item in before.get("conditions") or []}
    new = {item["type"]: item for item in after.get("conditions") or []}
    prepared = [event for kind in _TELLING if kind in new for event in _of_condition(kind, old.get(kind, {}), new[kind])]
    summary = _of_condition("Ready", old.get("Ready", {}), new["Ready"]) if "Ready" in new else ()
    paused = _paused(old.get("Progressing", {}), new.get("Progressing", {}))
    return list(dict.fromkeys([*paused, *_cached(before, after), *prepared, *_scaled(before, after), *_started(before, after), *summary]))


def _paused(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Event]:
    was, is_now = (item.get("reason") == Reason.PAUSED for item in (old, new))
    if is_now and not was:
        yield Event("Normal", EventReason.PAUSED, new.get("message", ""))
    if was and not is_now:
        yield Event("Normal", EventReason.RESUMED, "Resumed.")


def _cached(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterable[Event]:
    """A claim that was deleted and made again: told once, though what it held may take hours to be there again."""
    was, is_now = (status.get("cache") or {} for status in (before, after))
    if was and was.get("claim") == is_now.get("claim") and was.get("claimUid") != is_now.get("claimUid"):
        note = (
            f"PersistentVolumeClaim {is_now['claim']} was made anew: it is another volume, in which what the service needs is made again."
        )
        yield Event("Warning", EventReason.CACHE_REPLACED, note, "Prepare")


def _scaled(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterable[Event]:
    last: Mapping[str, Any] = after.get("lastScale") or {}
    if not last or last == before.get("lastScale"):
        return
    reason = EventReason.SCALED_UP if last["to"] > last["from"] else EventReason.SCALED_DOWN
    if last["to"] == 0:
        reason = EventReason.SCALED_TO_ZERO
    if last["from"] == 0:
        reason = EventReason.WOKE_UP
    note = f"From {last['from']} to {last['to']} replicas, {last['reason']}: {last.get('inputs', '')}."
    yield Event("Normal", reason, note, "Scale")


def _started(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterable[Event]:
    stage: Mapping[str, Any] = next(iter(after.get("stages") or []), {})
    last: Mapping[str, Any] = next(iter(before.get("stages") or []), {})
    if stage.get("state") == "Running" and stage.get("job") and stage.get("job") != last.get("job"):
        again = f", attempt {stage['attempt'] + 1}" if stage.get("attempt") else ""
        if stage["name"] == "fetch":
            yield Event("Normal", EventReason.FETCH_STARTED, f"Job {stage['job']}{again}.", "Fetch")
        if stage["name"] == "evict":
            what = f": {stage['message']}" if stage.get("message") else "."
            yield Event("Normal", EventReason.EVICTION_STARTED, f"Job {stage['job']}{again}{what}", "Evict")
        if stage["name"] == "quantize":
            yield Event("Normal", EventReason.QUANTIZATION_STARTED, f"Job {stage['job']}{again}.", "Quantize")
    if after.get("revision") and after.get("revision") != before.get("revision"):
        yield Event("Normal", EventReason.ROLLOUT_STARTED, f"Rolling out revision {after['revision']}.", "RollOut")


def _of_condition(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Event]:
    if (old.get("status"), old.get("reason")) == (new["status"], new["reason"]):
        return
    good = new["status"] == "True" and kind != "Degraded"
    if good:
        if old.get("status") != "True" and kind in _SUCCEEDED:
            reason = EventReason.FETCH_SUCCEEDED if new["reason"] == Reason.FETCHED else _SUCCEEDED[kind]
            yield Event("Normal", reason, new.get("message", ""))
        return
    if kind == "Ready":
        if new["reason"] == Reason.SUSPENDED:
            yield Event("Normal", EventReason.SUSPENDED, new.get("message", ""))
        elif old.get("reason") == Reason.SUSPENDED:
            yield Event("Normal", EventReason.RESUMED, "Resumed.")
        return
    if new["status"] != "Unknown" and new["reason"] not in _QUIET:
        yield Event("Warning", new["reason"], new.get("message", ""))


async def send(client: Client, parent: Object, events: Iterable[Event]) -> None:
    for event in events:
        try:
            await client.create(EVENTS, parent["metadata"]["namespace"], _build(parent, event))
        except ApiError as error:
            _log.info("Event %s on %s was not recorded: %s", event.reason, parent["metadata"]["name"], error)


def _build(parent: Object, event: Event) -> Object:
    metadata = parent["metadata"]
    return {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {"name": f"{metadata['name']}.{uuid.uuid4().hex[:16]}", "namespace": metadata["namespace"]},
        "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "gantline.io/operator",
        "reportingInstance": f"{FIELD_MANAGER}-{os.environ.get('HOSTNAME') or socket.gethostname()}"[:128],
        "action": event.action,
        "reason": event.reason,
        "note": event.note[:1024],
        "type": event.type,
        "regarding": {
            "apiVersion": "gantline.io/v1alpha1",
            "kind": "InferenceService",
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
    }
