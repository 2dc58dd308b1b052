"""AWS's Signature Version 4 for requests without a body, which is all that reading takes.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html; a test compares with the example that is computed there.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import quote, urlsplit

__all__ = ["Keys", "encode_path", "encode_query", "sign"]

_ALGORITHM = "AWS4-HMAC-SHA256"
_NOTHING = hashlib.sha256(b"").hexdigest()
_UNRESERVED = "-._~"


@dataclass(frozen=True)
class Keys:
    """Nothing set: requests are not signed, as for public buckets."""

    access_key: str = ""
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.access_key)


def encode_path(path: str) -> str:
    return quote(path, safe=f"{_UNRESERVED}/")


def encode_query(values: Mapping[str, str]) -> str:
    """In the order and the encoding that is signed."""
    return "&".join(f"{quote(name, safe=_UNRESERVED)}={quote(value, safe=_UNRESERVED)}" for name, value in sorted(values.items()))


def sign(method: str, url: str, headers: Mapping[str, str], keys: Keys, region: str, now: datetime) -> dict[str, str]:
    """`headers` with those that make the request ours. `url` has its path and query from the functions above; `now` is in UTC."""
    if not keys:
        return dict(headers)
    parts, moment = urlsplit(url), now.strftime("%Y%m%dT%H%M%SZ")
    signed = {name.lower(): value for name, value in headers.items()}
    signed |= {"host": parts.netloc, "x-amz-content-sha256": _NOTHING, "x-amz-date": moment}
    if keys.session_token:
        signed["x-amz-security-token"] = keys.session_token
    names = ";".join(sorted(signed))
    lines = "".join(f"{name}:{signed[name].strip()}\n" for name in sorted(signed))
    request = "\n".join((method, parts.path or "/", parts.query, lines, names, _NOTHING))
    scope = f"{moment[:8]}/{region}/s3/aws4_request"
    text = "\n".join((_ALGORITHM, moment, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{keys.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    del signed["host"]  # the client's own
    return {**signed, "authorization": f"{_ALGORITHM} Credential={keys.access_key}/{scope},SignedHeaders={names},Signature={signature}"}
