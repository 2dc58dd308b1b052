"""Every error that leaves the server has one shape: {"error": {"message", "type", "param", "code"}}, as OpenAI's clients expect.

`message` names cause and cure, `param` the field at fault (`messages[2].content`) or null, `code` is for programs:

    400 invalid_http, invalid_json, invalid_value, missing_parameter, unknown_parameter, unsupported_parameter
        context_length_exceeded, invalid_template
    401 missing_api_key, invalid_api_key
    404 not_found, model_not_found     405 method_not_allowed
    408 request_timeout, client_too_slow   413 body_too_large         415 unsupported_media_type
    429 queue_full (Retry-After)       500 internal_error, engine_error     504 deadline_exceeded
    503 overloaded (Retry-After), not_ready, draining, shutting_down, engine_dead, engine_stuck (Retry-After)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pydantic
from starlette.exceptions import HTTPException
from starlette.requests import Request

from gantline_runtime.engine_client import EngineUnavailable, RequestFailed
from gantline_runtime.server.api_error import ApiError, json_response, respond
from gantline_runtime.server.lifecycle import Lifecycle, State
from gantline_runtime.termination import Reason

__all__ = ["ApiError", "json_response", "not_accepting", "queue_full", "respond", "translate", "translate_validation"]


def not_accepting(lifecycle: Lifecycle) -> ApiError:
    """Why no request is taken now."""
    state = lifecycle.state
    if state in (State.LOADING, State.WARMING):
        progress = lifecycle.progress
        share = f", {progress:.0%}" if progress is not None else ""
        return ApiError(
            503, f"The model is {state} ({lifecycle.phase}{share}). Try again soon.", code="not_ready", headers={"Retry-After": "5"}
        )
    if state is State.DRAINING:
        message = "The server is draining and takes no new requests. Send the request again; another replica will answer."
        return ApiError(503, message, code="draining", headers={"Retry-After": "1", "Connection": "close"})
    return ApiError(503, "The engine is not running; the server is about to end.", code="engine_dead", headers={"Retry-After": "10"})


def queue_full(cause: str, retry_after_s: float) -> ApiError:
    """Why a request may not even wait, and when to try again."""
    wait = max(1, math.ceil(retry_after_s))
    message = f"{cause[:1].upper()}{cause[1:]}; more may not wait. Try again in {wait} s."
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(wait)})


def translate(error: Exception) -> ApiError | None:
    """The ApiError for an error of a lower layer, or None for what nobody foresaw: then it is our defect."""
    match error:
        case ApiError():
            return error
        case EngineUnavailable() if error.reason is Reason.DRAINED:
            return ApiError(503, "The server is shutting down. Send the request again.", code="shutting_down", headers={"Retry-After": "1"})
        case EngineUnavailable():
            return ApiError(500, f"{error} ({error.reason}). The server restarts; try again later.", code="engine_dead")
        case RequestFailed(code="queue_full"):
            return queue_full(str(error), error.retry_after_s)
        case RequestFailed(code="deadline"):
            return ApiError(504, str(error), code="deadline_exceeded")
        case RequestFailed(code="client_too_slow"):
            return ApiError(408, str(error), code="client_too_slow")
        case RequestFailed(code="invalid"):
            return ApiError(400, str(error), code="invalid_value")
        case RequestFailed():
            return ApiError(500, f"The engine gave up this request: {error}", code="engine_error")
        case pydantic.ValidationError():
            return translate_validation(error)
        case HTTPException():
            return _translate_http(error)
    return None


def _translate_http(error: HTTPException) -> ApiError:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)


def not_found(request: Request) -> ApiError:
    return ApiError(
        404, f"There is no {request.method} {request.url.path[:200]} here. See docs/server.md for the endpoints.", code="not_found"
    )


_CODES = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter", "json_invalid": "invalid_json"}


def translate_validation(error: pydantic.ValidationError) -> ApiError:
    """The first problem that pydantic found, by the path of its field. Our own checks raise errors whose type is the code; `param` in their
    context is the member at fault of what they check."""
    problem = error.errors(include_url=False, include_input=False)[0]
    kind, context = problem["type"], problem.get("ctx", {})
    param = _path([*problem["loc"], *([context["param"]] if "param" in context else [])])
    cause = problem["msg"].removeprefix("Value error, ")
    messages = {
        "missing": f"{param} is required.",
        "extra_forbidden": f"Unknown parameter: {param}.",
        "json_invalid": f"The body is not valid JSON: {context.get('error', '')}.",
        "unsupported_parameter": f"The parameter {param} is not supported. {context.get('advice')}" if "param" in context else cause,
        "invalid_value": cause,
    }
    text = messages.get(kind) or f"{param or 'The body'}: {cause}."
    return ApiError(400, text, code=_CODES.get(kind, kind if kind == "unsupported_parameter" else "invalid_value"), param=param or None)


_UNION_MEMBERS = frozenset({"str", "constrained-str"})


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content` for ("messages", 0, "content"); the names that pydantic gives to the members of a union are left out."""
    path = ""
    for part in location:
        if isinstance(part, str) and ("[" in part or part in _UNION_MEMBERS):
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path[:200]
