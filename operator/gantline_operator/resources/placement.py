"""Where a pod may run and what it takes there: the plan's devices and labels, the user's wishes, the installation's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gantline_operator.resource import PodSpec, Toleration
from gantline_operator.resources.context import Parent, Settings
from gantline_operator.resources.naming import GROUP, Object, content_hash
from gantline_operator.resources.pod import Mount, Placement
from gantline_operator.resources.quantities import bytes_quantity, cpu_quantity, overlay

__all__ = ["DevicePlan", "cpu_threads", "planned_placement", "same_node", "small_placement", "volume_labels"]

_VOLUME_LABEL = f"{GROUP}/cache-volume"
_HOST = "kubernetes.io/hostname"


class DevicePlan(Protocol):
    """What a plan says about one pod, of the server or of a stage."""

    @property
    def image(self) -> str: ...
    @property
    def resource(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def node_labels(self) -> Sequence[tuple[str, Sequence[str]]]: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def cpu_millis(self) -> int: ...


def planned_placement(parent: Parent, plan: DevicePlan, settings: Settings, *, resources: bool) -> Placement:
    """Of a pod that a plan was made for; with `resources` the user's `spec.pod.resources` count too. Raises MissingImage."""
    memory, cpu = bytes_quantity(plan.memory_bytes), cpu_quantity(plan.cpu_millis)
    devices = {plan.resource: str(plan.count)} if plan.resource else {}
    theirs = parent.spec.pod.resources if resources else None
    # CPU has no limit: throttling would stretch every token, and the request already shares a busy node fairly.
    requests, limits = overlay(
        {"cpu": cpu, "memory": memory}, {"memory": memory}, theirs.requests if theirs else None, theirs.limits if theirs else None
    )
    return Placement(
        image=settings.image(plan.image),
        image_pull_policy=settings.image_pull_policy,
        requests={**requests, **devices},
        limits={**limits, **devices},
        node_selector=dict(parent.spec.accelerator.node_selector or {}),
        node_requirements=[{"key": key, "operator": "In", "values": list(values)} for key, values in plan.node_labels],
        tolerations=_tolerations(parent.spec.pod, plan.resource),
        **_common(parent.spec.pod, settings),  # type: ignore[arg-type]
    )


def small_placement(parent: Parent, settings: Settings) -> Placement:
    """Of a stage that needs neither a plan nor an accelerator. Raises MissingImage."""
    resource = parent.spec.accelerator.resource
    return Placement(
        image=settings.small_image,
        image_pull_policy=settings.image_pull_policy,
        requests={"cpu": "100m", "memory": "256Mi"},
        limits={"memory": "1Gi"},
        node_selector=dict(parent.spec.accelerator.node_selector or {}),
        tolerations=_tolerations(parent.spec.pod, resource if "/" in resource else ""),
        **_common(parent.spec.pod, settings),  # type: ignore[arg-type]
    )


def cpu_threads(plan: DevicePlan, processes: int) -> int:
    """Threads of one of `processes`: torch would otherwise start one for each core of the node, whatever the pod's share of it."""
    return max(1, plan.cpu_millis // 1000 // processes)


def volume_labels(mounts: Sequence[Mount], cache_claim: str) -> dict[str, str]:
    """A label on each pod that mounts the cache claim, so that others can be put beside it; a claim's name itself may be too long."""
    uses_cache = any(mount.claim == cache_claim for mount in mounts)
    return {_VOLUME_LABEL: content_hash({"claim": cache_claim})} if uses_cache else {}


def same_node(marks: dict[str, str]) -> Object:
    """Affinity to the node on which the cache volume is in use, by whomever. The first pod is free: it matches its own term."""
    term = {"labelSelector": {"matchLabels": dict(marks)}, "topologyKey": _HOST}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}} if marks else {}


def _common(pod: PodSpec, settings: Settings) -> dict[str, object]:
    return {
        "priority_class": pod.priority_class_name or "",
        "runtime_class": pod.runtime_class_name or "",
        "image_pull_secrets": [*settings.image_pull_secrets, *(secret.name for secret in pod.image_pull_secrets)],
        "env": [{"name": variable.name, "value": variable.value} for variable in pod.env],
    }


def _tolerations(pod: PodSpec, resource: str) -> list[Object]:
    """The user's; and of the taint that GPU nodes carry by custom, named like the resource."""
    usual = [{"key": resource, "operator": "Exists"}] if resource else []
    theirs = [_toleration(item) for item in pod.tolerations]
    return usual + [item for item in theirs if item not in usual]


def _toleration(item: Toleration) -> Object:
    fields = {
        "key": item.key,
        "operator": item.operator,
        "value": item.value,
        "effect": item.effect,
        "tolerationSeconds": item.toleration_seconds,
    }
    return {key: value for key, value in fields.items() if value is not None}
