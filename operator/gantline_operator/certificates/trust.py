"""Where the API server reads which authority signs what it connects to: objects of the chart's, of which nothing but that is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gantline_operator.client import Object, Resource

__all__ = ["Trust", "trust_of_api", "trust_of_webhooks"]

_CONFIGURATIONS = Resource("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations")
_APIS = Resource("apiregistration.k8s.io/v1", "APIService", "apiservices")


@dataclass(frozen=True)
class Trust:
    """One such object. `bundles` reads the authorities (base64 of PEM) that a live one has; `naming` makes the fields that name another."""

    resource: Resource
    name: str
    bundles: Callable[[Object], list[str]]
    naming: Callable[[Object, str], Object]


def trust_of_webhooks(configuration: str) -> Trust:
    """All webhooks of a ValidatingWebhookConfiguration."""

    def bundles(live: Object) -> list[str]:
        return [hook["clientConfig"].get("caBundle", "") for hook in live.get("webhooks") or []]

    def naming(live: Object, bundle: str) -> Object:
        return {"webhooks": [{"name": hook["name"], "clientConfig": {"caBundle": bundle}} for hook in live.get("webhooks") or []]}

    return Trust(_CONFIGURATIONS, configuration, bundles, naming)


def trust_of_api(name: str) -> Trust:
    """An APIService, `v1.some.group`."""
    return Trust(_APIS, name, lambda live: [live["spec"].get("caBundle", "")], lambda live, bundle: {"spec": {"caBundle": bundle}})
