"""Where API keys come from, as the settings say: a file or a folder, Secrets, or nowhere; then whoever reaches the gateway may ask."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from gantline_runtime import logs
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.server.reloading import Reloader

from gantline_gateway.cluster_api import ClusterApi
from gantline_gateway.key_secrets import SecretKeys
from gantline_gateway.keys import KeyRing, keys_of_file
from gantline_gateway.settings import GatewaySettings

__all__ = ["FileKeys", "KeySource", "find_keys"]

log = logging.getLogger("gantline.gateway")


class KeySource(Protocol):
    ring: KeyRing
    """The keys as they are now."""

    @property
    def known(self) -> bool:
        """Whether `ring` has been filled."""

    async def run(self) -> None:
        """Keeps `ring` up to date, until cancelled or as long as there is something to do."""


class FileKeys:
    """The keys of a file or folder, which `reloader` reads again when it changes."""

    known = True

    def __init__(self, path: Path, reloader: Reloader) -> None:
        """Raises ConfigurationError if it cannot be read, or holds no key."""
        self._path = path
        self.ring = KeyRing()
        self._reload()
        reloader.watch([path], self._reload)

    async def run(self) -> None:
        """The reloader does it."""

    def _reload(self) -> None:
        ring = keys_of_file(self._path)
        if not ring.entries:
            raise ConfigurationError(f"{self._path} holds no API key", cure="Make one with `gantline api-key NAME --append FILE`.")
        self.ring = ring


def find_keys(settings: GatewaySettings, api: ClusterApi | None, reloader: Reloader) -> KeySource | None:
    """None where nobody needs a key, which is logged as a warning. Raises ConfigurationError."""
    if settings.api_keys is not None and settings.api_key_secrets:
        raise ConfigurationError("API keys are to come from a file and from Secrets", cure="Give api_keys or api_key_secrets, not both.")
    if settings.api_keys is not None:
        return FileKeys(settings.api_keys, reloader)
    if settings.api_key_secrets:
        if api is None:
            cure = "Name a file with --api-keys where --services names services."
            raise ConfigurationError("API keys are to come from Secrets, and no Kubernetes is asked", cure=cure)
        return SecretKeys(api, settings.api_key_secrets)
    log.warning("no API key is needed: whoever reaches this port may ask", extra=logs.fields(port=settings.port))
    return None
