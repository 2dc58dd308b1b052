"""What operators, load balancers and clients ask about the server itself: /health, /ready, /metrics, /version, /v1/models."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server.errors import ApiError, json_response, not_accepting
from gantline_runtime.server.lifecycle import State
from gantline_runtime.server.service import Service

__all__ = ["health", "list_models", "metrics", "ready", "show_model", "version"]


async def health(request: Request) -> Response:
    """Liveness: 200 while the engine gets on. Loading, being idle and being busy are all fine; a step that is stuck is not."""
    service: Service = request.app.state.service
    body = service.lifecycle.describe()
    if service.lifecycle.state is State.DEAD:
        raise ApiError(503, "The engine is not running; the server is about to end.", code="engine_dead", extra=body)
    _check_progress(service)
    return json_response(body)


async def ready(request: Request) -> Response:
    """Readiness: 200 when requests are welcome; 503 from the first moment of a drain."""
    service: Service = request.app.state.service
    if not service.lifecycle.is_ready:
        error = not_accepting(service.lifecycle)
        error.extra = service.lifecycle.describe()
        error.headers.pop("Connection", None)
        raise error
    _check_progress(service)
    return json_response(service.lifecycle.describe())


def _check_progress(service: Service) -> None:
    stuck, limit = service.seconds_without_progress(), service.config.step_timeout
    if stuck > limit:
        message = f"The engine has made no progress for {stuck:.0f} s, more than step_timeout ({limit:g} s). Restart the server."
        raise ApiError(503, message, code="engine_stuck", extra=service.lifecycle.describe())


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.render(service.lifecycle.state), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def version(request: Request) -> Response:
    return json_response({"version": request.app.state.version})


async def list_models(request: Request) -> Response:
    service: Service = request.app.state.service
    return json_response({"object": "list", "data": [_model_card(service)]})


async def show_model(request: Request) -> Response:
    service: Service = request.app.state.service
    card = _model_card(service)
    service.check_model_name(request.path_params["model"])
    return json_response(card)


def _model_card(service: Service) -> dict[str, object]:
    model = service.check_state()
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "gantline", "max_model_len": service.session_len}
