"""Services from a file, for use without Kubernetes. It is read again when it changes; a file that cannot be used leaves things as they are.

services:
  - name: tiny                       # asked for as `tiny` or `default/tiny`
    namespace: default
    servedName: tiny                 # what the replicas call the model; left out: the name
    replicas: [http://10.0.0.5:8000, http://10.0.0.6:8000]
    wanted: 2                        # left out: as many as replicas are listed, and at least 1
    suspended: false
    startupSeconds: 40               # for Retry-After while there is no replica
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from gantline_runtime.errors import ConfigurationError

from gantline_gateway.catalog import DEFAULT_STARTUP_S, Catalog, Replica, Service

__all__ = ["read_services"]

_MAX_BYTES = 1 << 20
_CURE = "docs/gateway.md has the format."


class _Service(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    name: str
    namespace: str = "default"
    served_name: str = ""
    replicas: list[str] = []
    wanted: int | None = None
    suspended: bool = False
    startup_seconds: float = DEFAULT_STARTUP_S


class _File(msgspec.Struct, forbid_unknown_fields=True):
    services: list[_Service]


def read_services(path: Path) -> Catalog:
    """Raises ConfigurationError for a file that cannot be read or holds something else."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}", cure=_CURE) from None
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"{path} has more than {_MAX_BYTES} bytes", cure=_CURE)
    try:
        found = msgspec.yaml.decode(content, type=_File)
        services = [_service(item) for item in found.services]
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigurationError(f"{path}: {error}", cure=_CURE) from None
    if len({service.key for service in services}) < len(services):
        raise ConfigurationError(f"{path} lists a service twice", cure="Give each a name of its own, or another namespace.")
    return Catalog.of(services)


def _service(item: _Service) -> Service:
    replicas = tuple(_replica(url) for url in item.replicas)
    return Service(
        namespace=item.namespace,
        name=item.name,
        served_name=item.served_name,
        replicas=replicas,
        wanted=max(1, len(replicas)) if item.wanted is None else item.wanted,
        suspended=item.suspended,
        startup_s=item.startup_seconds,
    )


def _replica(url: str) -> Replica:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"{url[:200]!r} is not an address such as http://10.0.0.5:8000")
    port = parts.port or 80
    return Replica(f"{parts.hostname}:{port}", parts.hostname, port)
