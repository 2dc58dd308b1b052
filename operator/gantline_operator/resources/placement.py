"""From a plan's placement to a pod's base: the chosen devices and labels, the user's wishes, the installation's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gantline_operator.plan_types import Placement
from gantline_operator.quantities import parse_quantity
from gantline_operator.resource import PodSpec, ResourcesSpec, Toleration
from gantline_operator.resources.context import Parent, Settings
from gantline_operator.resources.naming import GROUP, Object, content_hash
from gantline_operator.resources.pod import Mount, PodBase
from gantline_operator.resources.quantities import bytes_quantity, cpu_quantity, overlay

__all__ = ["apart", "build_base", "cache_selector", "cpu_threads", "same_node", "spread", "volume_labels"]

_VOLUME_LABEL = f"{GROUP}/cache-volume"
_HOST = "kubernetes.io/hostname"
_ZONE = "topology.kubernetes.io/zone"


def build_base(parent: Parent, placement: Placement, settings: Settings, *, wished: ResourcesSpec | None = None) -> PodBase:
    """A pod's base; `wished` are the user's own amounts of CPU and memory, which go before the plan's. Raises MissingImage."""
    spec, wished = parent.spec, wished or ResourcesSpec()
    memory, cpu = bytes_quantity(placement.memory_bytes), cpu_quantity(placement.cpu_millis)
    # CPU has no limit: throttling would stretch every token, and the request already shares a busy node fairly.
    requests, limits = overlay({"cpu": cpu, "memory": memory}, {"memory": memory}, wished.requests, wished.limits)
    devices = {placement.resource: str(placement.count)} if placement.resource else {}
    return PodBase(
        image=settings.image(placement.image),
        image_pull_policy=settings.image_pull_policy,
        requests={**requests, **devices},
        limits={**limits, **devices},
        node_selector=dict(spec.accelerator.node_selector or {}),
        node_requirements=[{"key": item.key, "operator": "In", "values": list(item.values)} for item in placement.node_labels],
        tolerations=_tolerations(placement.tolerated, spec.pod),
        priority_class=spec.pod.priority_class_name or "",
        runtime_class=spec.pod.runtime_class_name or "",
        image_pull_secrets=[*settings.image_pull_secrets, *(secret.name for secret in spec.pod.image_pull_secrets)],
        user=settings.pod_user,
        env=[{"name": variable.name, "value": variable.value} for variable in spec.pod.env],
    )


def cpu_threads(base: PodBase, processes: int) -> int:
    """Threads of one of `processes`: torch would otherwise start one for each core of the node, whatever the pod's share of it."""
    cores = parse_quantity(base.limits.get("cpu") or base.requests["cpu"])
    return max(1, int(cores) // processes)


def volume_labels(mounts: Sequence[Mount], cache_claim: str, tied: Sequence[str]) -> dict[str, str]:
    """A label on each pod that mounts the cache claim, or else one that is `tied` to a node, so that others can be put beside it."""
    marked = [cache_claim] if any(mount.claim == cache_claim for mount in mounts) else list(tied)
    return {_VOLUME_LABEL: _mark(marked[0])} if marked else {}


def cache_selector(claim: str) -> str:
    """A label selector for every pod that mounts the cache claim, of whatever service."""
    return f"{_VOLUME_LABEL}={_mark(claim)}"


def same_node(tied: Sequence[str]) -> Object:
    """Affinity to the node on which one of the claims is in use, by whomever. The first pod is free: it matches its own term.

    One label for whatever claim, and one term: the scheduler counts only pods that match all terms, and no other pod mounts both a source
    and a cache, as one that quantizes does. It has the label of its cache.
    """
    if not tied:
        return {}
    marks = [_mark(claim) for claim in tied]
    one_of = {"matchExpressions": [{"key": _VOLUME_LABEL, "operator": "In", "values": marks}]}
    selector = {"matchLabels": {_VOLUME_LABEL: marks[0]}} if len(marks) == 1 else one_of
    term = {"labelSelector": selector, "topologyKey": _HOST}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def _mark(claim: str) -> str:
    """A claim's name itself may be too long for a label."""
    return content_hash({"claim": claim})


def spread(marks: Mapping[str, str]) -> list[Object]:
    """Constraints by which pods with these labels prefer the node that has the fewest of them. None is kept waiting for it."""
    selector = {"matchLabels": dict(marks)}
    return [{"maxSkew": 1, "topologyKey": _HOST, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": selector}]


def apart(marks: Mapping[str, str]) -> Object:
    """Affinity by which pods with these labels prefer the zone that has the fewest of them.

    As a second spread constraint it would undo the first one where nodes have no zone: the scheduler scores no node that lacks a key of
    any constraint. A term of affinity is left out there by itself.
    """
    term = {"labelSelector": {"matchLabels": dict(marks)}, "topologyKey": _ZONE}
    return {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}}


def _tolerations(tolerated: Iterable[str], pod: PodSpec) -> list[Object]:
    """Of the taints that nodes with such devices carry by custom, then the user's."""
    usual: list[Object] = [{"key": key, "operator": "Exists"} for key in tolerated]
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
