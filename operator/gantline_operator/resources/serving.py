"""What serves: a ServiceAccount without rights, a Service, a Deployment, and a PodDisruptionBudget where there are replicas to keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gantline_runtime.config import ServerConfig, to_arguments

from gantline_operator.claim_sharing import Sharing
from gantline_operator.plan_types import Plan
from gantline_operator.resources.context import ModelLocation, Parent, Settings
from gantline_operator.resources.naming import GROUP, REVISION, Object, content_hash, labels, metadata, pod_selector, service_account_name
from gantline_operator.resources.placement import apart, build_base, cpu_threads, same_node, spread, volume_labels
from gantline_operator.resources.pod import PodBase, build_container, build_pod
from gantline_operator.rollout_strategy import StrategyName

__all__ = [
    "PAUSED", "RESTARTED_AT", "SERVER_PORT", "build_template", "disruption_budgets", "replicas", "revision", "service_account", "serving",
    "startup_budget_s",
]  # fmt: skip

RESTARTED_AT = f"{GROUP}/restartedAt"
"""Annotation of a service; another value replaces its pods."""
PAUSED = f"{GROUP}/paused"
"""Annotation of a service whose children are to be left as they are."""

SERVER_PORT = 8000
_STARTUP_PERIOD_S = 2
_PULL_ALLOWANCE_S = 900  # an image of 6 GB on a slow registry, and a node that has to be started first
_PULL_BYTES_PER_S = 20 * 10**6  # of a model that is mounted as an image, on such a registry
_EXIT_ALLOWANCE_S = 30  # from the end of the drain time to the end of the process


def serving(
    parent: Parent,
    plan: Plan,
    model: ModelLocation,
    settings: Settings,
    *,
    strategy: StrategyName,
    template: Object | None = None,
) -> list[Object]:
    """All objects that serve `model`, in the order in which they are applied.

    `template` is the pod template of the same revision as it was rendered first: given, it stands, so that a new operator restarts no pod.
    Raises MissingImage.
    """
    mark = revision(parent, plan, model)
    wanted = template if template is not None else build_template(parent, plan, model, settings)
    deployment = _deployment(parent, plan, model, settings, wanted, mark, strategy)
    return [service_account(parent, settings), _service(parent, settings), deployment, *disruption_budgets(parent, settings)]


def service_account(parent: Parent, settings: Settings) -> Object:
    """The identity of the server's and the stages' pods: no rights, no token. It goes before the first Job."""
    marks = labels(parent.name, "server", version=settings.version)
    meta = metadata(service_account_name(parent.name), parent.namespace, marks, parent.owner)
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta, "automountServiceAccountToken": False}


def replicas(parent: Parent) -> int:
    return 0 if parent.spec.suspend else parent.spec.replicas


def revision(parent: Parent, plan: Plan, model: ModelLocation) -> str:
    """A hash over what pods are made from: the plan, the model's place, the spec's part that reaches a pod; not image or template."""
    spec, placement = parent.spec, plan.placement
    return content_hash(
        {
            "engine": to_arguments(plan.engine),
            "server": to_arguments(_server_config(parent)),
            "devices": [placement.image, placement.resource, placement.count, placement.memory_bytes, placement.cpu_millis],
            "nodes": [[item.key, list(item.values)] for item in placement.node_labels],
            "selector": dict(spec.accelerator.node_selector or {}),
            "tolerated": list(placement.tolerated),
            "promise": plan.memory.total,
            "model": [model.path, [mount.claim for mount in model.mounts], model.one_node, *_mounted_images(model)],
            "pod": _given(spec.pod),
            "restartedAt": parent.restarted_at,
        }
    )


def _mounted_images(model: ModelLocation) -> list[Any]:
    """Nothing where there are none: hashes are older than images."""
    return [[[image.reference, image.pull_secret] for image in model.images]] if model.images else []


def _given(value: Any) -> Any:
    """`value` as plain JSON, without what equals its default: a field that a later version adds must not change old hashes."""
    if not dataclasses.is_dataclass(value):
        return [_given(item) for item in value] if isinstance(value, tuple) else value
    given = {item.name: getattr(value, item.name) for item in dataclasses.fields(value) if getattr(value, item.name) != _default(item)}
    return {name: _given(item) for name, item in given.items()}


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def startup_budget_s(plan: Plan) -> int:
    """Seconds from the container's start after which it is given up: three times the prediction, and two minutes."""
    return 3 * math.ceil(plan.load_seconds) + 120  # whole seconds first, as status keeps them: a plan read back gives the same pods


def build_template(parent: Parent, plan: Plan, model: ModelLocation, settings: Settings) -> Object:
    """The pod template of the Deployment. Raises MissingImage."""
    base = build_base(parent, plan.placement, settings, wished=parent.spec.pod.resources)
    server, tp = _server_config(parent), plan.engine.tp
    # Trust is the installation's matter and in no revision's hash: pods that run are not replaced for it.
    arguments = ["serve", model.path, *to_arguments(plan.engine), *to_arguments(dataclasses.replace(server, trust_gateway=True))]
    container = build_container("server", base, arguments, env=_environment(plan, base), mounts=model.mounts, images=model.images, tp=tp)
    container["ports"] = [{"name": "http", "containerPort": SERVER_PORT, "protocol": "TCP"}]
    container.update(_probes(plan))
    tied = [mount.claim for mount in model.mounts] if model.one_node else []
    beside, mark = volume_labels(model.mounts, parent.cache_claim, tied), revision(parent, plan, model)
    # Of the same revision alone: pods that are about to go must not decide where their successors run.
    siblings = {**pod_selector(parent.name, "server"), REVISION: mark}
    pod = build_pod(
        base,
        container,
        service_account=service_account_name(parent.name),
        mounts=model.mounts,
        images=model.images,
        tp=tp,
        affinity=same_node(tied) if tied else apart(siblings),
        topologySpreadConstraints=[] if tied else spread(siblings),
        terminationGracePeriodSeconds=math.ceil(server.drain_delay + server.drain_timeout) + _EXIT_ALLOWANCE_S,
    )
    marks = {**labels(parent.name, "server", revision=mark), **beside}
    annotations = {"annotations": {RESTARTED_AT: parent.restarted_at}} if parent.restarted_at else {}
    return {"metadata": {"labels": marks, **annotations}, "spec": pod}


def _server_config(parent: Parent) -> ServerConfig:
    return ServerConfig(
        host="0.0.0.0", port=SERVER_PORT, served_model_name=parent.served_name, drain_timeout=parent.spec.rollout.drain_timeout
    )


def _environment(plan: Plan, base: PodBase) -> list[Object]:
    on_gpu = bool(plan.placement.resource)
    threads = [] if on_gpu else [{"name": "OMP_NUM_THREADS", "value": str(cpu_threads(base, plan.engine.tp))}]
    return [
        # Bytes of one GPU; the runtime compares them with what it reserves and exports the difference.
        {"name": "GANTLINE_PLANNED_BYTES", "value": str(plan.memory.total)},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
        *threads,
    ]


def _probes(plan: Plan) -> Object:
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
    parent: Parent,
    plan: Plan,
    model: ModelLocation,
    settings: Settings,
    template: Mapping[str, Any],
    mark: str,
    strategy: StrategyName,
) -> Object:
    marks = labels(parent.name, "server", version=settings.version, revision=mark)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(parent.name, parent.namespace, marks, parent.owner),
        "spec": {
            "replicas": replicas(parent),
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": startup_budget_s(plan) + _PULL_ALLOWANCE_S + math.ceil(model.pull_bytes / _PULL_BYTES_PER_S),
            "strategy": _strategy(replicas(parent), model, strategy),
            "selector": {"matchLabels": pod_selector(parent.name, "server")},
            "template": dict(template),
        },
    }


def _strategy(count: int, model: ModelLocation, strategy: StrategyName) -> Object:
    """Surge: one more pod first, where the volume lets it in. Drain: replicas are replaced one by one in place; first all go, then all
    come, where there is only one, or where a volume ties pods to a node that may not hold both."""
    if strategy == "Surge" and model.sharing is not Sharing.ONE_POD:
        return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    if model.one_node or count <= 1:
        return {"type": "Recreate"}
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


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


def disruption_budgets(parent: Parent, settings: Settings) -> list[Object]:
    """None where there is no replica to spare. It belongs to no revision: which one serves makes no difference."""
    if replicas(parent) <= 1:
        return []
    marks = labels(parent.name, "server", version=settings.version)
    budget = {
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
    return [budget]
