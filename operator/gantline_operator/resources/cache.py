"""The claim for what stages make. Created once: a claim's spec cannot be changed, and another size or class is another claim."""

from __future__ import annotations

from gantline_operator.resources.context import Parent, Settings
from gantline_operator.resources.naming import Object, cache_claim_name, labels, metadata
from gantline_operator.resources.quantities import bytes_quantity

__all__ = ["cache_claim"]


def cache_claim(parent: Parent, settings: Settings, size_bytes: int) -> Object:
    """Of `spec.cache.size`, else of `size_bytes`; not called for where the user names a claim of their own."""
    cache = parent.spec.cache
    assert cache.claim_name is None, "the user's own claim is not ours to make"
    marks = labels(parent.name, "cache", version=settings.version)
    storage_class = {"storageClassName": cache.storage_class_name} if cache.storage_class_name else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(cache_claim_name(parent.name), parent.namespace, marks, parent.owner),
        "spec": {
            "accessModes": [cache.access_mode],
            **storage_class,
            "resources": {"requests": {"storage": bytes_quantity(cache.size or size_bytes)}},
        },
    }
