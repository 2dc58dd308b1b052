"""What a pod's status says, in our words: where it is, how long each phase took, and what is wrong with it.

Our containers leave their reason in the termination message; what ends them from outside (the kernel, the kubelet, a lost node) is told
from exit codes, waiting reasons and conditions. The text comes from containers, so it is cut and never trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gantline_runtime import termination
from gantline_runtime.termination import TerminationMessage

from gantline_operator.conditions import Reason, from_termination

__all__ = ["PodState", "Trouble", "parse_time", "read_pod"]

Object = dict[str, Any]

_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable", "ImageInspectError"}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CreateSandboxError"}
_LOST_REASONS = {"DeletionByTaintManager", "DeletionByPodGC", "TerminationByKubelet"}
_PEACEFUL = {termination.Reason.COMPLETED, termination.Reason.DRAINED}
_TEXT = 600


@dataclass(frozen=True)
class Trouble:
    reason: Reason
    message: str
    cure: str = ""

    @property
    def text(self) -> str:
        """Cause and cure as sentences: a container's own words come without a full stop."""
        whole = not self.cure or self.message.endswith((".", "!", "?"))
        return f"{self.message if whole else f'{self.message}.'} {self.cure}".strip()


@dataclass(frozen=True)
class PodState:
    """One pod. Times are None while the phase is still to come."""

    name: str
    uid: str
    role: str
    job: str
    """Name of the Job that made it, else empty."""
    revision: str
    node: str
    phase: str
    deleting: bool
    ready: bool
    restarts: int
    created: datetime
    scheduled: datetime | None
    started: datetime | None
    ready_at: datetime | None
    trouble: Trouble | None
    answer: TerminationMessage | None
    """The last words of its container, where they are ours."""
    address: str = ""
    """Its IP, once it has one."""
    deletion_cost: int = 0
    """What decides which pod goes when there are to be fewer."""


def parse_time(text: object) -> datetime | None:
    """An RFC 3339 time as the API server writes it."""
    try:
        return datetime.fromisoformat(str(text)) if text else None
    except ValueError:
        return None


def read_pod(pod: Object) -> PodState:
    metadata, status = pod["metadata"], pod.get("status") or {}
    labels = metadata.get("labels") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    container: Object = next(iter(status.get("containerStatuses") or []), {})
    ready = conditions.get("Ready", {}).get("status") == "True"
    running = (container.get("state") or {}).get("running") or {}
    scheduled = conditions.get("PodScheduled", {})
    created = parse_time(metadata.get("creationTimestamp"))
    assert created is not None, "the API server gives every object a creation time"
    return PodState(
        name=metadata["name"],
        uid=metadata["uid"],
        role=labels.get("gantline.io/role", ""),
        job=labels.get("batch.kubernetes.io/job-name", ""),
        revision=labels.get("gantline.io/revision", ""),
        node=(pod.get("spec") or {}).get("nodeName", ""),
        phase=status.get("phase", "Pending"),
        deleting="deletionTimestamp" in metadata,
        ready=ready,
        restarts=container.get("restartCount", 0),
        created=created,
        scheduled=parse_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None,
        started=parse_time(running.get("startedAt")),
        ready_at=parse_time(conditions["Ready"].get("lastTransitionTime")) if ready else None,
        trouble=None if "deletionTimestamp" in metadata or ready else _trouble(pod, status, conditions, container),
        answer=_answer(container),
        address=str(status.get("podIP", "")),
        deletion_cost=_cost((metadata.get("annotations") or {}).get("controller.kubernetes.io/pod-deletion-cost")),
    )


def _cost(text: object) -> int:
    """0 for what is no number, as the ReplicaSet's controller takes it."""
    try:
        return int(str(text or 0))
    except ValueError:
        return 0


def _answer(container: Object) -> TerminationMessage | None:
    for state in ("state", "lastState"):
        terminated = (container.get(state) or {}).get("terminated") or {}
        if (message := termination.parse(str(terminated.get("message", "")))) is not None:
            return message
    return None


def _trouble(pod: Object, status: Object, conditions: dict[str, Object], container: Object) -> Trouble | None:
    if status.get("phase") == "Succeeded":
        return None
    if status.get("phase") == "Failed":
        return _failed(status, conditions, container)
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _unscheduled(scheduled)
    return _waiting(container, (pod.get("spec") or {}).get("volumes") or []) or _restarted(container)


def _failed(status: Object, conditions: dict[str, Object], container: Object) -> Trouble:
    target = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True" and target.get("reason") in _LOST_REASONS:
        return Trouble(Reason.NODE_LOST, _text(target.get("message"), "The pod's node went away."))
    if status.get("reason") in ("Evicted", "Preempting") or target.get("status") == "True":
        return Trouble(Reason.POD_EVICTED, _text(status.get("message") or target.get("message"), "The pod was evicted."))
    if status.get("reason") in ("NodeLost", "NodeShutdown", "Shutdown", "Terminated"):
        return Trouble(Reason.NODE_LOST, _text(status.get("message"), "The pod's node went away."))
    terminated = (container.get("state") or {}).get("terminated")
    return _ended(terminated) if terminated else Trouble(Reason.CONTAINER_FAILED, _text(status.get("message"), "The pod failed."))


def _ended(terminated: Object) -> Trouble:
    """Why a container is no more; its own words first, unless the kernel took them away."""
    code, reason = terminated.get("exitCode", 0), terminated.get("reason", "")
    message = termination.parse(str(terminated.get("message", "")))
    if reason == "OOMKilled":
        return Trouble(Reason.OUT_OF_MEMORY, "The container was killed at its memory limit.", "Raise pod.resources.limits.memory.")
    if message is not None and message.reason not in _PEACEFUL:
        return Trouble(from_termination(message.reason), message.message[:_TEXT], message.cure)
    if code in (137, 143):
        return Trouble(Reason.POD_KILLED, f"The container was killed from outside (exit code {code}).")
    return Trouble(Reason.CONTAINER_FAILED, _text(terminated.get("message"), f"The container ended with exit code {code} ({reason})."))


def _unscheduled(condition: Object) -> Trouble:
    message = _text(condition.get("message"), "No node takes the pod yet.")
    if "unbound immediate PersistentVolumeClaims" in message:  # it goes on with what preemption did not find
        return Trouble(Reason.WAITING_FOR_VOLUME, message, "Check the claim's StorageClass.")
    if "persistentvolumeclaim" in message.lower() and "not found" in message:
        return Trouble(Reason.WAITING_FOR_VOLUME, message, "Create the claim.")
    if "persistentvolumeclaim" in message.lower() and "being deleted" in message:
        return Trouble(Reason.WAITING_FOR_VOLUME, message, "It goes once no pod mounts it: then one that Gantline made is made anew.")
    if "ReadWriteOncePod" in message:
        cure = "It starts once the other pod is gone: set replicas to 0 until a Job is through, or use a claim that several pods can mount."
        return Trouble(Reason.WAITING_FOR_VOLUME, message, cure)
    return Trouble(Reason.WAITING_FOR_CAPACITY, message)


def _waiting(container: Object, volumes: list[Object]) -> Trouble | None:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), str(waiting.get("message", ""))[:_TEXT]
    if reason in _IMAGE_REASONS:
        mounted = [volume["image"].get("reference", "") for volume in volumes if "image" in volume]
        image = next((name for name in mounted if name and name in message), container.get("image", ""))
        text = f"The image {image} cannot be pulled ({reason}). {message}"
        return Trouble(Reason.IMAGE_PULL_FAILED, text.strip(), "Check the image's name and the pull secrets.")
    if reason in _CONFIG_REASONS:
        return Trouble(Reason.POD_CONFIGURATION, f"The container cannot be created ({reason}): {message}")
    if reason == "CrashLoopBackOff":
        return _crash_loop(container)
    return None


def _crash_loop(container: Object) -> Trouble:
    terminated = (container.get("lastState") or {}).get("terminated")
    ended = _ended(terminated) if terminated else None
    if ended is None or ended.reason in (Reason.CONTAINER_FAILED, Reason.INTERNAL_ERROR):
        detail = ended.text if ended else ""
        return Trouble(Reason.ENGINE_CRASH_LOOP, f"The container keeps ending soon after its start. {detail}".strip())
    return ended


def _restarted(container: Object) -> Trouble | None:
    """It runs again, but what ended it last time still explains why it is not ready."""
    terminated = (container.get("lastState") or {}).get("terminated")
    return _ended(terminated) if terminated else None


def _text(text: object, default: str) -> str:
    return str(text)[:_TEXT] if text else default
