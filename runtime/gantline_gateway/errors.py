"""Errors that the gateway itself answers with, in the one shape of `gantline_runtime.server.api_error`. Everything else is the replica's.

400 invalid_http, invalid_json, invalid_value, missing_parameter, ambiguous_model     404 not_found, model_not_found
405 method_not_allowed     408 request_timeout     413 body_too_large   415 unsupported_media_type
429 queue_full (Retry-After): too many wait for a replica already
502 bad_gateway: the replica failed, or answered what no client can be given
503 no_replica (Retry-After), suspended, scaled_to_zero, overloaded, not_ready, draining, shutting_down
"""

from __future__ import annotations

from typing import Any

import msgspec
from gantline_runtime.server.api_error import ApiError

__all__ = ["not_found", "not_known_yet", "read_error", "replica_failed", "shutting_down", "takes_no_more"]


def replica_failed(replica: str, cause: Exception) -> ApiError:
    message = f"The replica {replica!r} failed while it answered ({str(cause)[:200]}). Send the request again."
    return ApiError(502, message, code="bad_gateway")


def shutting_down() -> ApiError:
    message = "The gateway is shutting down and could not wait for this answer's end. Send the request again."
    return ApiError(503, message, code="shutting_down", headers={"Retry-After": "1", "Connection": "close"})


def takes_no_more() -> ApiError:
    message = "The gateway is draining and takes no new requests. Send the request again; another one will answer."
    return ApiError(503, message, code="draining", headers={"Retry-After": "1", "Connection": "close"})


def not_known_yet() -> ApiError:
    message = "The gateway does not know the services yet. Try again soon."
    return ApiError(503, message, code="not_ready", headers={"Retry-After": "2"})


def not_found(method: str, path: str) -> ApiError:
    return ApiError(404, f"There is no {method[:20]} {path[:200]} here. See docs/gateway.md for the endpoints.", code="not_found")


def read_error(status: int, body: bytes) -> ApiError:
    """The error in a replica's answer; where it holds none, one that says so."""
    try:
        error: Any = msgspec.json.decode(body)["error"]
        return ApiError(status, str(error["message"]), code=error["code"], param=error["param"])
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
        return ApiError(502, f"The replica answered with status {status} and without an error's body.", code="bad_gateway")
