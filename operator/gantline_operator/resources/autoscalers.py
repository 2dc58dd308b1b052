"""Autoscalers that others run: a HorizontalPodAutoscaler, or KEDA's ScaledObject, where `scaling.controller` names them.

Both point at the InferenceService's scale subresource, never at the Deployment, which the operator alone writes; and both follow the same
measure as Gantline's own loop: replicas' worth of load, of which each replica is meant to carry one.
"""

from __future__ import annotations

from gantline_operator.autoscaling.policy import Policy
from gantline_operator.resources.context import Parent, Settings
from gantline_operator.resources.naming import API_VERSION, KIND, Object, labels, metadata

__all__ = ["AUTOSCALER_KINDS", "LOAD_METRIC", "autoscalers", "load_path"]

AUTOSCALER_KINDS = frozenset({"HorizontalPodAutoscaler", "ScaledObject"})
"""Of which a service has one at most: that of the controller which its spec names."""

LOAD_METRIC = "gantline_load"
"""Of a pod, at custom.metrics.k8s.io."""
_HPA_LONGEST_WINDOW_S = 3600  # the API's bound; the CRD has a rule for it


def load_path(namespace: str, name: str) -> str:
    """Path at which the operator tells a service's load, in replicas' worth."""
    return f"/load/{namespace}/{name}"


def autoscalers(parent: Parent, settings: Settings, policy: Policy | None) -> list[Object]:
    """None where Gantline's own loop scales, or nobody."""
    if policy is None or policy.controller == "Gantline":
        return []
    build = _horizontal_pod_autoscaler if policy.controller == "HPA" else _scaled_object
    return [build(parent, settings, policy)]


def _horizontal_pod_autoscaler(parent: Parent, settings: Settings, policy: Policy) -> Object:
    metric = {"metric": {"name": LOAD_METRIC}, "target": {"type": "AverageValue", "averageValue": "1"}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(parent, settings),
        "spec": {
            "scaleTargetRef": _target(parent),
            "minReplicas": policy.floor,
            "maxReplicas": policy.max,
            "metrics": [{"type": "Pods", "pods": metric}],
            "behavior": _behavior(policy),
        },
    }


def _scaled_object(parent: Parent, settings: Settings, policy: Policy) -> Object:
    address = f"{settings.load_url}{load_path(parent.namespace, parent.name)}"
    trigger = {"url": address, "valueLocation": "load", "targetValue": "1", "activationTargetValue": "0"}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": _metadata(parent, settings),
        "spec": {
            "scaleTargetRef": _target(parent),
            "pollingInterval": 5,
            "cooldownPeriod": int(policy.zero_after_s),
            # Else one that was made a moment ago would put a service to sleep with its first look.
            "initialCooldownPeriod": int(policy.zero_after_s),
            "minReplicaCount": policy.min,
            "maxReplicaCount": policy.max,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(policy)}},
            "triggers": [{"type": "metrics-api", "metricType": "AverageValue", "metadata": trigger}],
        },
    }


def _behavior(policy: Policy) -> Object:
    return {"scaleDown": {"stabilizationWindowSeconds": min(_HPA_LONGEST_WINDOW_S, int(policy.down_after_s))}}


def _target(parent: Parent) -> Object:
    return {"apiVersion": API_VERSION, "kind": KIND, "name": parent.name}


def _metadata(parent: Parent, settings: Settings) -> Object:
    return metadata(parent.name, parent.namespace, labels(parent.name, "server", version=settings.version), parent.owner)
