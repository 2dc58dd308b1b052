"""Names, labels and owner references of what the operator makes for one InferenceService.

A child's name is a function of the service's name alone, a Job's also of a hash over what it does; so a second reconcile finds the first
one's objects. A service's name has at most 40 characters and is a DNS label (the CRD sees to it), which keeps every name here legal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "MANAGED_BY",
    "MANAGED_KINDS",
    "PLURAL",
    "REVISION",
    "SELECTOR",
    "ManagedKind",
    "Object",
    "Role",
    "Stage",
    "cache_claim_name",
    "child_selector",
    "content_hash",
    "job_name",
    "labels",
    "metadata",
    "owner_reference",
    "pod_selector",
    "service_account_name",
]  # fmt: skip

Object = dict[str, Any]
"""A Kubernetes object as plain JSON."""

GROUP = "gantline.io"
API_VERSION = f"{GROUP}/v1alpha1"
KIND = "InferenceService"
PLURAL = "inferenceservices"
MANAGED_BY = "gantline-operator"
"""Value of `app.kubernetes.io/managed-by`, and the field manager of every apply."""

REVISION = f"{GROUP}/revision"
"""Label of what belongs to one revision; of a Job, the hash over what it does."""

SELECTOR = f"app.kubernetes.io/managed-by={MANAGED_BY}"
"""Finds every object that the operator made, of whatever service."""

Stage = Literal["inspect", "fetch", "quantize", "evict"]
Role = Literal["server", "inspect", "fetch", "quantize", "evict", "cache"]

_HASH_LENGTH = 10
_MAX_ATTEMPT = 99


@dataclass(frozen=True)
class ManagedKind:
    """A kind of which services own objects: watched, and pruned where an object is wanted no more."""

    api_version: str
    kind: str
    plural: str
    optional: bool = False
    """Not every cluster knows it, and few services have one: not watched (the resync mends what others change), and listed in vain without
    that being a problem."""


MANAGED_KINDS: tuple[ManagedKind, ...] = (
    ManagedKind("v1", "ServiceAccount", "serviceaccounts"),
    ManagedKind("v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
    ManagedKind("v1", "Service", "services"),
    ManagedKind("batch/v1", "Job", "jobs"),
    ManagedKind("apps/v1", "Deployment", "deployments"),
    ManagedKind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ManagedKind("networking.k8s.io/v1", "Ingress", "ingresses"),
    ManagedKind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    ManagedKind("apps/v1", "ControllerRevision", "controllerrevisions"),
    ManagedKind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", optional=True),
    ManagedKind("keda.sh/v1alpha1", "ScaledObject", "scaledobjects", optional=True),
    ManagedKind("inference.networking.k8s.io/v1", "InferencePool", "inferencepools", optional=True),
)


def content_hash(content: Mapping[str, Any]) -> str:
    """Ten hexadecimal characters over `content`'s canonical JSON: the same inputs give the same name in every process."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_LENGTH]


def job_name(service: str, stage: Stage, digest: str, attempt: int = 0) -> str:
    """At most 40 + 1 + 8 + 1 + 10 + 3 = 63 characters. A retry (`attempt` 1 to 99) is a Job of its own, so the failed one keeps its log."""
    assert 0 <= attempt <= _MAX_ATTEMPT, f"attempt {attempt} is outside 0 to {_MAX_ATTEMPT}"
    return f"{service}-{stage}-{digest}" + (f"-{attempt}" if attempt else "")


def cache_claim_name(service: str) -> str:
    """Of the claim that we make; `spec.cache.claimName` names one that is there already."""
    return f"{service}-cache"


def service_account_name(service: str) -> str:
    return f"{service}-runtime"


def pod_selector(service: str, role: Role) -> dict[str, str]:
    """Labels that never change in an object's life, hence fit for a Deployment's selector."""
    return {f"{GROUP}/service": service, f"{GROUP}/role": role}


def child_selector(service: str) -> str:
    """A label selector for every child of one service."""
    return f"{SELECTOR},{GROUP}/service={service}"


def labels(service: str, role: Role, *, version: str = "", revision: str = "") -> dict[str, str]:
    """The standard labels and ours. Pods get no `version`: an upgraded operator must not restart what runs."""
    marks = {
        "app.kubernetes.io/name": "gantline",
        "app.kubernetes.io/instance": service,
        "app.kubernetes.io/component": role,
        "app.kubernetes.io/part-of": "gantline",
        "app.kubernetes.io/managed-by": MANAGED_BY,
        **pod_selector(service, role),
    }
    if version:
        marks["app.kubernetes.io/version"] = version
    if revision:
        marks[REVISION] = revision
    return marks


def owner_reference(name: str, uid: str) -> Object:
    return {"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": uid, "controller": True, "blockOwnerDeletion": True}


def metadata(name: str, namespace: str, marks: Mapping[str, str], owner: Object) -> Object:
    return {"name": name, "namespace": namespace, "labels": dict(marks), "ownerReferences": [owner]}
