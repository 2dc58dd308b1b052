"""The operator's settings: from GANTLINE_* environment variables (the chart sets them) and flags of the same names, flags winning.

An unknown GANTLINE_* variable is an error: a misspelt one would otherwise be ignored for as long as nobody looks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gantline_runtime.errors import ConfigurationError
from gantline_runtime.settings import Source, document, read
from gantline_runtime.settings import names as _names
from gantline_runtime.settings import namespaces as _namespaces
from gantline_runtime.settings import number as _number
from gantline_runtime.settings import object_name as _object_name
from gantline_runtime.settings import one_of as _one_of
from gantline_runtime.settings import setting as _setting
from gantline_runtime.settings import switch as _switch
from gantline_runtime.settings import text as _text
from gantline_runtime.termination import Reason

__all__ = ["PREFIX", "OperatorSettings", "documented_settings", "from_environment"]

PREFIX = "GANTLINE_"

_NOT_OURS = ("GANTLINE_CACHE", "GANTLINE_TERMINATION_LOG")
"""Of the development cluster, and of every container."""
_LEVELS = ("debug", "info", "warning", "error")

_PEER = re.compile(
    r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(/[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?=[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
)


def _pod_user(value: str) -> int | None:
    """None: whom the cluster gives."""
    return None if value.strip() == "cluster" else _number(1, (1 << 31) - 1)(value)


def _peers(value: str) -> tuple[str, ...]:
    found = _names(value)
    for name in found:
        if not _PEER.fullmatch(name):
            raise ValueError(f"{name!r} is neither a namespace nor NAMESPACE/LABEL=VALUE")
    return found


@dataclass(frozen=True)
class OperatorSettings:
    """Each default is followed by what it is for and its unit; the environment's name is the field's in capitals after `GANTLINE_`."""

    watch_namespaces: tuple[str, ...] = _setting(
        _namespaces, (), "Namespaces to serve, separated by commas; empty serves the whole cluster and needs the cluster-wide role."
    )
    image_cuda: str = _setting(_text, "", "Runtime image for NVIDIA GPUs; empty: plans that need it are refused with NoRuntimeImage.")
    image_cpu: str = _setting(_text, "", "Runtime image for CPUs, also used by inspect and fetch Jobs.")
    image_rocm: str = _setting(_text, "", "Runtime image for AMD GPUs.")
    image_ascend: str = _setting(_text, "", "Runtime image for Ascend NPUs.")
    image_pull_policy: str = _setting(
        _one_of("IfNotPresent", "Always", "Never"), "IfNotPresent", "Pull policy of every pod that the operator makes."
    )
    image_pull_secrets: tuple[str, ...] = _setting(
        _names, (), "Pull secrets for every pod, separated by commas, beside those of spec.pod.imagePullSecrets."
    )
    pod_user: int | None = _setting(
        _pod_user,
        1000,
        "User and group that the pods of services run as, and group of the files in their volumes; cluster: as the cluster gives them out, "
        "as OpenShift does by namespace.",
    )
    hf_endpoint: str = _setting(_text, "", "Address of a Hugging Face hub or mirror for hf:// sources; empty is the public hub.")
    s3_endpoint: str = _setting(_text, "", "Address of an S3 endpoint for s3:// sources whose Secret names none; empty is AWS.")
    insecure_registries: tuple[str, ...] = _setting(
        _names, (), "Registries (host or host:port, separated by commas) of oci:// sources that speak plain HTTP."
    )
    network_policies: bool = _setting(
        _switch, False, "true makes NetworkPolicies for each service's pods, which do nothing unless the cluster's network enforces them."
    )
    server_clients: tuple[str, ...] = _setting(
        _peers, (), "With network policies, who reaches servers: NAMESPACE, or NAMESPACE/LABEL=VALUE for some of its pods; empty: everyone."
    )
    inference_pools: str = _setting(
        _one_of("auto", "true", "false"),
        "auto",
        "Whether each service gets an InferencePool of the Gateway API; auto: where the cluster knows the kind when the operator starts.",
    )
    inventory_configmap: str = _setting(
        _object_name, "", "namespace/name of a ConfigMap that describes node pools which labels do not, or which are now at zero."
    )
    calibration_configmap: str = _setting(
        _text, "", "namespace/name of a ConfigMap in which is kept what starts of models measured; empty: forgotten with the operator."
    )
    observe_nodes: str = _setting(
        _one_of("auto", "never"), "auto", "auto lists nodes and all pods where that is allowed; never leaves capacity to the scheduler."
    )
    demand_namespace: str = _setting(
        _text, "", "Namespace of the gateways, which are asked what they hold; empty: there are none, and nothing sleeps at zero."
    )
    demand_port: int = _setting(
        _number(1, 65535), 8081, "Port of the gateways at which they say it (GET /demand): their GANTLINE_GATEWAY_INTERNAL_PORT."
    )
    scaling_interval_seconds: int = _setting(
        _number(1, 300), 5, "Services with spec.scaling are looked at this often. A sample older than three times this counts as unknown."
    )
    load_url: str = _setting(
        _text, "", "Address of the operator's metrics port inside the cluster, at which KEDA asks for a service's load; empty: it cannot."
    )
    custom_metrics_port: int = _setting(
        _number(0, 65535), 0, "Port of the API custom.metrics.k8s.io, which HorizontalPodAutoscalers follow; 0 turns it off."
    )
    custom_metrics_hosts: tuple[str, ...] = _setting(
        _names, (), "Names or addresses by which the API server reaches that port, separated by commas; its certificate is made for them."
    )
    custom_metrics_secret: str = _setting(
        _object_name, "", "namespace/name of the Secret that keeps that port's certificate, which the operator renews; empty: it is given."
    )
    custom_metrics_certificate: str = _setting(
        _text, "/etc/gantline/custom-metrics", "Folder with tls.crt and tls.key of that port where they are given; read again at changes."
    )
    lease: str = _setting(
        _object_name, "", "namespace/name of the Lease that says which of several operators works; empty: there is no other operator."
    )
    lease_seconds: int = _setting(
        _number(3, 600), 15, "How long after its last renewal a Lease may be taken over; its holder stops writing after two thirds of it."
    )
    identity: str = _setting(
        _text, "", "Name of this process in the Lease, such as its pod's; one that finds its name there goes on at once. Empty: a new name."
    )
    address: str = _setting(
        _text, "", "Address at which other operators reach this one; one that waits passes autoscalers' questions on to the one that works."
    )
    metrics_port: int = _setting(_number(0, 65535), 8080, "Port of /metrics; 0 turns it off.")
    health_port: int = _setting(_number(0, 65535), 8081, "Port of /healthz; 0 turns it off.")
    webhook_port: int = _setting(_number(0, 65535), 0, "Port of the webhook that warns at admission; 0 turns it off.")
    webhook_hosts: tuple[str, ...] = _setting(
        _names, (), "Names or addresses by which the API server reaches the webhook, separated by commas; its certificate is made for them."
    )
    webhook_secret: str = _setting(_object_name, "", "namespace/name of the Secret that keeps the webhook's certificate for all replicas.")
    webhook_configuration: str = _setting(_text, "", "Name of the ValidatingWebhookConfiguration that is told the certificate's authority.")
    listen_address: str = _setting(_text, "0.0.0.0", "Address that both ports listen on.")
    workers: int = _setting(_number(1, 64), 8, "Services reconciled at once.")
    resync_seconds: int = _setting(
        _number(10, 86400), 450, "Every service is reconciled again after this many seconds, give or take a third, whatever happened."
    )
    reconcile_deadline_seconds: int = _setting(
        _number(5, 3600), 120, "A reconcile that takes longer is cancelled and retried; a worker that ignores that fails /healthz."
    )
    job_retention_seconds: int = _setting(
        _number(60, 2592000), 86400, "How long finished Jobs are kept for their logs once their result is recorded."
    )
    log_level: str = _setting(_one_of(*_LEVELS), "info", "Least severe level that is logged.")

    @property
    def images(self) -> dict[str, str]:
        """Runtime images by accelerator, those that are set."""
        images = {"cuda": self.image_cuda, "cpu": self.image_cpu, "rocm": self.image_rocm, "ascend": self.image_ascend}
        return {kind: image for kind, image in images.items() if image}


def documented_settings() -> list[tuple[str, str, str, str]]:
    """(variable, flag, default, help) of every setting: the table in docs/operations.md, which a test compares."""
    return document(OperatorSettings, PREFIX)


def from_environment(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> OperatorSettings:
    """Settings from variables, then flags. Raises ConfigurationError naming the variable or flag and what it takes."""
    source = Source("gantline-operator", "Runs InferenceServices.", PREFIX, _NOT_OURS)
    settings: OperatorSettings = read(OperatorSettings, source, environment, arguments)
    if settings.webhook_port and not (settings.webhook_hosts and settings.webhook_secret and settings.webhook_configuration):
        message = "the webhook has a port, but no hosts, Secret or configuration"
        raise ConfigurationError(message, reason=Reason.INVALID_CONFIGURATION, cure="Set all GANTLINE_WEBHOOK_* variables, or none.")
    if settings.custom_metrics_secret and not settings.custom_metrics_hosts:
        message = "the certificate for custom metrics has a Secret, but no hosts"
        raise ConfigurationError(message, reason=Reason.INVALID_CONFIGURATION, cure="Set GANTLINE_CUSTOM_METRICS_HOSTS too.")
    return settings
