"""Who may talk to a service's pods, and to whom they may: NetworkPolicies, where the installation asks for them.

    NAME-isolated   every pod of the service: nothing in, nothing out
    NAME-server     but servers answer at their port, to everyone or to the clients that the installation names, and may look names up
    NAME-fetch      but what reads a remote source may look names up and reach its server, or the proxy before it

Policies add up, so each of the last two only allows. Ranks of a server share its pod, where no policy applies.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from gantline_operator.resources.context import Parent, Settings, source_location
from gantline_operator.resources.naming import GROUP, Object, labels, metadata, pod_selector
from gantline_operator.resources.serving import SERVER_PORT

__all__ = ["network_policies"]

_DNS_PORTS = (53, 5353)
"""Of names' servers; OpenShift's pods listen at the second one, and a policy is about the pod's port, whatever its Service's."""
_DNS: Object = {"ports": [{"protocol": protocol, "port": port} for port in _DNS_PORTS for protocol in ("UDP", "TCP")]}
_WEB_PORTS = (80, 443)
_ADDRESSES = ("HF_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""Variables of a service that name where downloads go; proxies are written in small letters too."""


def network_policies(parent: Parent, settings: Settings) -> list[Object]:
    """None where the installation does not ask for them. They go before the first pod."""
    if not settings.network_policies:
        return []
    of_service = {"matchLabels": {f"{GROUP}/service": parent.name}}
    of_server = {"matchLabels": pod_selector(parent.name, "server")}
    readers = {**of_service, "matchExpressions": [{"key": f"{GROUP}/role", "operator": "In", "values": ["inspect", "fetch"]}]}
    policies = [
        _policy(parent, settings, "isolated", of_service, policyTypes=["Ingress", "Egress"]),
        _policy(
            parent, settings, "server", of_server,
            policyTypes=["Ingress", "Egress"], ingress=[{"ports": [_tcp(SERVER_PORT)], **_clients(settings)}], egress=[_DNS],
        ),
    ]  # fmt: skip
    if source_location(parent.spec.model.uri) is None:
        server = {"ports": [_tcp(port) for port in _source_ports(parent, settings)]}
        policies.append(_policy(parent, settings, "fetch", readers, policyTypes=["Egress"], egress=[_DNS, server]))
    return policies


def _policy(parent: Parent, settings: Settings, name: str, selector: Object, **spec: Any) -> Object:
    """Every name has an ending, so that a service called NAME-server has none of NAME's."""
    marks = labels(parent.name, "server" if name != "fetch" else "fetch", version=settings.version)
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(f"{parent.name}-{name}", parent.namespace, marks, parent.owner),
        "spec": {"podSelector": selector, **spec},
    }


def _clients(settings: Settings) -> Object:
    """The rule's part that says from whom; none of it is everyone."""
    return {"from": [_peer(client) for client in settings.server_clients]} if settings.server_clients else {}


def _peer(client: str) -> Object:
    """Of `NAMESPACE` or `NAMESPACE/LABEL=VALUE`. Every namespace has the label with its name (since Kubernetes 1.22)."""
    namespace, _, label = client.partition("/")
    key, _, value = label.partition("=")
    pods = {"podSelector": {"matchLabels": {key: value}}} if label else {}
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}, **pods}


def _tcp(port: int) -> Object:
    return {"protocol": "TCP", "port": port}


def _source_ports(parent: Parent, settings: Settings) -> list[int]:
    """The web's, since hubs and registries send clients elsewhere for large files, and those that the addresses in use name. An endpoint
    that only the Secret names is not among them: the operator reads no Secrets."""
    uri = parent.spec.model.uri
    registry = uri.removeprefix("oci://").partition("/")[0] if uri.startswith("oci://") else ""
    given = [variable.value for variable in parent.spec.pod.env if variable.name.upper() in _ADDRESSES]
    named = (_port(address) for address in (settings.hf_endpoint, settings.s3_endpoint, registry, *given))
    return sorted({*_WEB_PORTS, *(port for port in named if port)})


def _port(address: str) -> int | None:
    """A port that an address names, with or without a scheme; None also for what is no address, which its reader will complain about."""
    try:
        return urlsplit(address if "//" in address else f"//{address}").port
    except ValueError:
        return None
