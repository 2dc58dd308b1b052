"""A service as an InferencePool of the Gateway API (https://gateway-api-inference-extension.sigs.k8s.io), where the cluster has that kind.

Gateways that know the kind send requests to the pods themselves, as an endpoint picker tells them. The picker is the user's own to install,
under the name that its chart gives it for a pool of this name; until it answers, gateways choose by themselves.
"""

from __future__ import annotations

from gantline_operator.resources.context import Parent, Settings
from gantline_operator.resources.naming import Object, labels, metadata, pod_selector
from gantline_operator.resources.serving import SERVER_PORT

__all__ = ["inference_pool"]

_PICKER_PORT = 9002


def inference_pool(parent: Parent, settings: Settings) -> Object:
    """It belongs to no revision: its pods are the service's, whatever they serve."""
    picker = {"kind": "Service", "name": f"{parent.name}-epp", "port": {"number": _PICKER_PORT}, "failureMode": "FailOpen"}
    return {
        "apiVersion": "inference.networking.k8s.io/v1",
        "kind": "InferencePool",
        "metadata": metadata(parent.name, parent.namespace, labels(parent.name, "server", version=settings.version), parent.owner),
        "spec": {
            "selector": {"matchLabels": pod_selector(parent.name, "server")},
            "targetPorts": [{"number": SERVER_PORT}],
            "endpointPickerRef": picker,
        },
    }
