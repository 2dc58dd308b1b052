"""API keys that lie in Secrets of the gateway's own namespace, with the label `gantline.io/api-keys: "true"`.

Each entry of such a Secret is a key: its name, and as its value the key itself or its hash, with options, as `keys.py` has them. An entry
that cannot be read is left out, and the others count; the log says which and why, and never shows a value. A new key is known within the
moment that a watch takes, and so is the end of one.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gantline_runtime import logs
from gantline_runtime.errors import ConfigurationError

from gantline_gateway.cluster_api import ClusterApi, Kind
from gantline_gateway.keys import ApiKey, KeyRing, keys_of_entry
from gantline_gateway.mirror import Mirror

__all__ = ["LABEL", "SecretKeys", "collect_keys"]

LABEL = "gantline.io/api-keys"
"""Label of the Secrets that are read, with the value "true"."""

log = logging.getLogger("gantline.gateway")

_MAX_VALUE = 1 << 16


class SecretKeys:
    """`ring` has the keys of all such Secrets of `namespace` as they are now, while `run` runs. Make it on the event loop."""

    def __init__(self, api: ClusterApi, namespace: str) -> None:
        self.ring = KeyRing()
        self._mirror = Mirror(api, Kind("v1", "secrets", selector=f"{LABEL}=true"), namespace, self._collect)

    @property
    def known(self) -> bool:
        return self._mirror.known

    async def run(self) -> None:
        """Until cancelled."""
        await self._mirror.run()

    def _collect(self) -> None:
        secrets = self._mirror.objects.values()
        try:
            self.ring = collect_keys(secrets)
        except ConfigurationError as error:
            log.error("API keys stay as they were", extra=logs.fields(cause=str(error), cure=error.cure))
        else:
            log.info("API keys are known", extra=logs.fields(keys=len(self.ring.entries), secrets=len(secrets)))


def collect_keys(secrets: Iterable[Mapping[str, Any]]) -> KeyRing:
    """In the order of the Secrets' names, so that all gateways come to the same. Raises ConfigurationError for too many."""
    by_name = sorted(secrets, key=lambda secret: str(secret["metadata"]["name"]))
    return KeyRing.of(entry for secret in by_name for entry in _readable(secret["metadata"]["name"], secret.get("data") or {}))


def _readable(secret: str, data: Mapping[str, str]) -> Iterator[tuple[bytes, ApiKey]]:
    for name, value in sorted(data.items()):
        try:
            yield from keys_of_entry(secret, name, _text(name, value))
        except ConfigurationError as error:
            log.error("an API key cannot be used", extra=logs.fields(secret=secret, cause=str(error), cure=error.cure))


def _text(name: str, value: str) -> str:
    try:
        content = base64.b64decode(value, validate=True)
        if len(content) <= _MAX_VALUE:
            return content.decode()
    except (binascii.Error, UnicodeDecodeError):
        pass
    raise ConfigurationError(f"the key {name!r} is no text, or has more than {_MAX_VALUE} bytes", cure="docs/operations.md has the format.")
