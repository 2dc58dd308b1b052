"""How clients outside the cluster reach a service: an Ingress, where the spec names a host.

It belongs to no revision: it follows the spec at once, also while another revision is being prepared or the last good one serves again.
"""

from __future__ import annotations

from gantline_operator.resources.context import Parent, Settings
from gantline_operator.resources.naming import Object, labels, metadata

__all__ = ["ingress"]

_PATH = "/v1"
"""What is public: the API. Metrics, health and the API's documentation stay inside the cluster."""


def ingress(parent: Parent, settings: Settings) -> list[Object]:
    """The service's Ingress, none without `spec.ingress`. Annotations and TLS are left to their owners: an apply keeps what others set."""
    wanted = parent.spec.ingress
    if wanted is None:
        return []
    backend = {"service": {"name": parent.name, "port": {"name": "http"}}}
    rule = {"host": wanted.host, "http": {"paths": [{"path": _PATH, "pathType": "Prefix", "backend": backend}]}}
    marks = labels(parent.name, "server", version=settings.version)
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "Ingress",
            "metadata": metadata(parent.name, parent.namespace, marks, parent.owner),
            "spec": {**({"ingressClassName": wanted.class_name} if wanted.class_name else {}), "rules": [rule]},
        }
    ]
