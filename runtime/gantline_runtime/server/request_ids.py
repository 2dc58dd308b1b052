"""The name under which a request is found in the logs of everybody that it passes."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

__all__ = ["read_request_id"]

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")


def read_request_id(headers: Mapping[str, str]) -> str:
    """The client's X-Request-Id if it is a plain short word, else one of ours."""
    given = headers.get("x-request-id", "")
    return given if _PLAIN.fullmatch(given) else uuid.uuid4().hex
