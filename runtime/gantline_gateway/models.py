"""GET /v1/models and /v1/models/{id}, from the catalog: also services at zero, since a request for one is held until it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gantline_gateway.catalog import Catalog, Service

__all__ = ["list_models", "show_model"]


def list_models(catalog: Catalog, visible: Callable[[Service], bool]) -> dict[str, Any]:
    cards = [_card(name, service) for name, service in sorted(catalog.public_names(visible).items())]
    return {"object": "list", "data": cards}


def show_model(catalog: Catalog, model: str, visible: Callable[[Service], bool]) -> dict[str, Any]:
    """Under the name that was asked for. Raises ApiError as `Catalog.resolve` does."""
    return _card(model, catalog.resolve(model, visible))


def _card(name: str, service: Service) -> dict[str, Any]:
    length = {} if service.session_len is None else {"max_model_len": service.session_len}
    state = {"ready_replicas": len(service.usable), "suspended": service.suspended}
    return {"id": name, "object": "model", "created": service.created, "owned_by": "gantline", **length, **state}
