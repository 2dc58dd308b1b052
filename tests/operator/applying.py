"""Objects on the API server of a test, written as the operator writes them: server-side apply with strict field validation."""

from __future__ import annotations

from typing import Any

from gantline_devcluster.client import Client

Object = dict[str, Any]

CLUSTER_WIDE = (
    "APIService",
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "Namespace",
    "ValidatingWebhookConfiguration",
)


def path_of(item: Object) -> str:
    """Where the object lives; every kind that we write has the plural that one expects."""
    version, kind, metadata = item["apiVersion"], item["kind"], item["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    scope = "" if kind in CLUSTER_WIDE else f"/namespaces/{metadata['namespace']}"
    plural = {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"}.get(kind, f"{kind.lower()}s")
    return f"{root}{scope}/{plural}/{metadata['name']}"


def apply(client: Client, item: Object, *, namespace: str | None = None, dry_run: bool = False) -> Object:
    """The live object. With `namespace` it is put there; a real one loses its owner, else the garbage collector would miss that."""
    metadata = {**item["metadata"], **({"namespace": namespace} if namespace else {})}
    if not dry_run:
        metadata.pop("ownerReferences", None)
    body = {**item, "metadata": metadata}
    query = "?fieldManager=gantline-operator&force=true&fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
    live: Object = client.call("PATCH", path_of(body) + query, body, content_type="application/apply-patch+yaml")
    return live
