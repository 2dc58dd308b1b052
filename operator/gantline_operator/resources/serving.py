"""What serves: a ServiceAccount without rights, a Service, a Deployment, and a PodDisruptionBudget where there are replicas to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from gantline_runtime.config import EngineConfig, ServerConfig, to_arguments

from gantline_operator.resources.context import ModelLocation, Parent, Settings
from gantline_operator.resources.naming import GROUP, Object, content_hash, labels, metadata, pod_selector, service_account_name
from gantline_operator.resources.placement import DevicePlan, cpu_threads, planned_placement, same_node, volume_labels
from gantline_operator.resources.pod import build_container, build_pod

__all__ = ["RESTARTED_AT", "ServingPlan", "build_template", "replicas", "revision", "service_account", "serving", "startup_budget_s"]

RESTARTED_AT = f"{GROUP}/restartedAt"
"""Annotation of a service; another value replaces its pods."""

_PORT = 8000
_STARTUP_PERIOD_S = 2
_PULL_ALLOWANCE_S = 900  # an image of 6 GB on a slow registry, and a node that has to be started first
_EXIT_ALLOWANCE_S = 30  # from the end of the drain time to the end of the process


class ServingPlan(DevicePlan, Protocol):
    """A plan of the server's pods."""

    @property
    def backend(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    @property
    def tensor_parallel(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def session_len(self) -> int: ...
    @property
    def max_batch_size(self) -> int: ...
    @property
    def cache_blocks(self) -> int | None: ...
    @property
    def planned_bytes(self) -> int: ...
    @property
    def load_seconds(self) -> float: ...


def serving(
    parent: Parent, plan: ServingPlan, model: ModelLocation, settings: Settings, *, template: Object | None = None
) -> list[Object]:
    """All objects that serve `model`, in the order in which they are applied.

    `template` is the pod template of the same revision as it was rendered first: given, it stands, so that a new operator restarts no pod.
    Raises MissingImage.
    """
    mark = revision(parent, plan, model)
    wanted = template if template is not None else build_template(parent, plan, model, settings)
    budget = [_disruption_budget(parent, settings)] if replicas(parent) > 1 else []
    deployment = _deployment(parent, plan, model, settings, wanted, mark)
    return [service_account(parent, settings), _service(parent, settings), deployment, *budget]


def service_account(parent: Parent, settings: Settings) -> Object:
    """The identity of the server's and the stages' pods: no rights, no token. It goes before the first Job."""
    marks = labels(parent.name, "server", version=settings.version)
    meta = metadata(service_account_name(parent.name), parent.namespace, marks, parent.owner)
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta, "automountServiceAccountToken": False}


def replicas(parent: Parent) -> int:
    return 0 if parent.spec.suspend else parent.spec.replicas


def revision(parent: Parent, plan: ServingPlan, model: ModelLocation) -> str:
    """A hash over what pods are made from: the plan, the model's place, the spec's part that reaches a pod; not image or template."""
    spec = parent.spec
    return content_hash(
        {
            "plan": [plan.backend, plan.device, plan.tensor_parallel, plan.dtype, plan.session_len, plan.max_batch_size, plan.cache_blocks],
            "devices": [plan.image, plan.resource, plan.count, plan.memory_bytes, plan.cpu_millis, plan.planned_bytes],
            "labels": [[key, list(values)] for key, values in plan.node_labels],
            "model": [model.path, [mount.claim for mount in model.mounts], model.one_node],
            "engine": [spec.engine.cache_max_entry_count, spec.engine.enable_prefix_caching],
            "names": [parent.served_name, dict(spec.accelerator.node_selector or {})],
            "drain": spec.rollout.drain_timeout,
            "pod": repr(spec.pod),
            "restartedAt": parent.restarted_at,
        }
    )


def startup_budget_s(plan: ServingPlan) -> int:
    """Seconds from the container's start after which it is given up: three times the prediction, and two minutes."""
    return math.ceil(3 * plan.load_seconds) + 120


def build_template(parent: Parent, plan: ServingPlan, model: ModelLocation, settings: Settings) -> Object:
    """The pod template of the Deployment. Raises MissingImage."""
    placement = planned_placement(parent, plan, settings, resources=True)
    server = _server_config(parent)
    container = build_container(
        "server", placement, _arguments(parent, plan, model, server), env=_environment(plan), mounts=model.mounts, tp=plan.tensor_parallel
    )
    container["ports"] = [{"name": "http", "containerPort": _PORT, "protocol": "TCP"}]
    container.update(_probes(plan))
    beside = volume_labels(model.mounts, parent.cache_claim)
    pod = build_pod(
        placement,
        container,
        service_account=service_account_name(parent.name),
        mounts=model.mounts,
        tp=plan.tensor_parallel,
        affinity=same_node(beside) if model.one_node else {},
        terminationGracePeriodSeconds=math.ceil(server.drain_delay + server.drain_timeout) + _EXIT_ALLOWANCE_S,
    )
    marks = {**labels(parent.name, "server", revision=revision(parent, plan, model)), **beside}
    annotations = {"annotations": {RESTARTED_AT: parent.restarted_at}} if parent.restarted_at else {}
    return {"metadata": {"labels": marks, **annotations}, "spec": pod}


def _server_config(parent: Parent) -> ServerConfig:
    return ServerConfig(
        host="0.0.0.0", port=_PORT, served_model_name=parent.served_name, drain_timeout=parent.spec.rollout.drain_timeout
    )


def _arguments(parent: Parent, plan: ServingPlan, model: ModelLocation, server: ServerConfig) -> list[str]:
    engine = EngineConfig(
        backend=plan.backend,
        device=plan.device,
        dtype=plan.dtype,
        tp=plan.tensor_parallel,
        session_len=plan.session_len,
        max_batch_size=plan.max_batch_size,
        cache_max_entry_count=parent.spec.engine.cache_max_entry_count,
        num_cache_blocks=plan.cache_blocks,
        enable_prefix_caching=parent.spec.engine.enable_prefix_caching,
    )
    return ["serve", model.path, *to_arguments(engine), *to_arguments(server)]


def _environment(plan: ServingPlan) -> list[Object]:
    threads = [{"name": "OMP_NUM_THREADS", "value": str(cpu_threads(plan, plan.tensor_parallel))}] if plan.device == "cpu" else []
    return [
        # The runtime compares it with what it reserves and exports the difference.
        {"name": "GANTLINE_PLANNED_BYTES", "value": str(plan.planned_bytes)},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
        *threads,
    ]


def _probes(plan: ServingPlan) -> Object:
    """Ready is startup's question too: until a model is loaded, liveness is nobody's business but the budget's."""
    return {
        "startupProbe": {
            **_get("/ready"), "periodSeconds": _STARTUP_PERIOD_S, "timeoutSeconds": 5,
            "failureThreshold": math.ceil(startup_budget_s(plan) / _STARTUP_PERIOD_S),
        },
        "readinessProbe": {**_get("/ready"), "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**_get("/health"), "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
    }  # fmt: skip


def _get(path: str) -> Object:
    return {"httpGet": {"path": path, "port": "http"}}


def _deployment(
    parent: Parent, plan: ServingPlan, model: ModelLocation, settings: Settings, template: Mapping[str, Any], mark: str
) -> Object:
    marks = labels(parent.name, "server", version=settings.version, revision=mark)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(parent.name, parent.namespace, marks, parent.owner),
        "spec": {
            "replicas": replicas(parent),
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": startup_budget_s(plan) + _PULL_ALLOWANCE_S,
            "strategy": _strategy(replicas(parent), plan, model),
            "selector": {"matchLabels": pod_selector(parent.name, "server")},
            "template": dict(template),
        },
    }


def _strategy(count: int, plan: ServingPlan, model: ModelLocation) -> Object:
    """Surge where a further pod costs only CPU and memory. On GPUs replicas are replaced one by one in place: a spare GPU is not to be
    counted on. First all go, then all come: a single replica on GPUs, and a volume that ties pods to a node that may not hold both.
    """
    if model.one_node or (plan.resource and count <= 1):
        return {"type": "Recreate"}
    surge, missing = (0, 1) if plan.resource else (1, 0)
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": missing}}


def _service(parent: Parent, settings: Settings) -> Object:
    marks = labels(parent.name, "server", version=settings.version)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(parent.name, parent.namespace, marks, parent.owner),
        "spec": {
            "type": "ClusterIP",
            "selector": pod_selector(parent.name, "server"),
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _disruption_budget(parent: Parent, settings: Settings) -> Object:
    marks = labels(parent.name, "server", version=settings.version)
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(parent.name, parent.namespace, marks, parent.owner),
        # A replica that is not ready helps nobody: a drain need not wait for it.
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": pod_selector(parent.name, "server")},
        },
    }
