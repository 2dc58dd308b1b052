"""Kubernetes objects from a plan: pure functions, plain dicts, the same answer for the same question.

naming       names, labels, owner references, hashes
context      the service, the installation's settings, where a model lies
pod          what every pod has in common
placement    where a pod runs and what it takes
jobs         inspect, fetch, quantize, evict
serving      ServiceAccount, Service, Deployment, PodDisruptionBudget
autoscalers  the HorizontalPodAutoscaler or ScaledObject, where the spec names another controller than Gantline
ingress      the Ingress, where a host is named
inference_pool  the InferencePool, where the cluster has that kind
network      NetworkPolicies, where the installation asks for them
cache        the claim for artefacts
"""

from gantline_operator.resources.autoscalers import AUTOSCALER_KINDS, LOAD_METRIC, autoscalers, load_path
from gantline_operator.resources.cache import cache_claim
from gantline_operator.resources.context import (
    MissingImage,
    ModelLocation,
    Parent,
    Settings,
    cache_location,
    image_location,
    source_location,
)
from gantline_operator.resources.inference_pool import inference_pool
from gantline_operator.resources.ingress import ingress
from gantline_operator.resources.jobs import (
    ALGORITHM_VERSIONS,
    ATTEMPT,
    evict_hash,
    evict_job,
    fetch_hash,
    fetch_job,
    inspect_hash,
    inspect_job,
    quantize_hash,
    quantize_job,
    quantize_job_hash,
)  # fmt: skip
from gantline_operator.resources.naming import (
    MANAGED_KINDS,
    SELECTOR,
    ManagedKind,
    Object,
    cache_claim_name,
    child_selector,
    job_name,
    labels,
    owner_reference,
    pod_selector,
)  # fmt: skip
from gantline_operator.resources.network import network_policies
from gantline_operator.resources.placement import cache_selector
from gantline_operator.resources.pod import ImageMount, Mount, image_pods
from gantline_operator.resources.serving import (
    PAUSED,
    RESTARTED_AT,
    build_template,
    disruption_budgets,
    replicas,
    revision,
    service_account,
    serving,
    startup_budget_s,
)  # fmt: skip

__all__ = [
    "ALGORITHM_VERSIONS",
    "ATTEMPT",
    "AUTOSCALER_KINDS",
    "LOAD_METRIC",
    "MANAGED_KINDS",
    "PAUSED",
    "RESTARTED_AT",
    "SELECTOR",
    "ImageMount",
    "ManagedKind",
    "MissingImage",
    "ModelLocation",
    "Mount",
    "Object",
    "Parent",
    "Settings",
    "autoscalers",
    "build_template",
    "cache_claim",
    "cache_claim_name",
    "cache_location",
    "cache_selector",
    "child_selector",
    "disruption_budgets",
    "evict_hash",
    "evict_job",
    "fetch_hash",
    "fetch_job",
    "image_location",
    "image_pods",
    "inference_pool",
    "ingress",
    "inspect_hash",
    "inspect_job",
    "job_name",
    "labels",
    "load_path",
    "network_policies",
    "owner_reference",
    "pod_selector",
    "quantize_hash",
    "quantize_job",
    "quantize_job_hash",
    "replicas",
    "revision",
    "service_account",
    "serving",
    "source_location",
    "startup_budget_s",
]
