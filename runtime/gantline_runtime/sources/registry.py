"""An image registry (OCI's distribution protocol), as far as reading goes: manifests by tag or digest, and ranges of blobs by digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gantline_runtime.checkpoint.files import load_json
from gantline_runtime.errors import CheckpointError
from gantline_runtime.sources.patience import Interrupted, Refused, Service, persist
from gantline_runtime.sources.registry_login import answer_challenge, find_login, parse_challenge
from gantline_runtime.sources.uri import ImageReference
from gantline_runtime.sources.web import open_client, refusal_of, skipped, take

if TYPE_CHECKING:
    import httpx

__all__ = ["INDEXES", "INSECURE_REGISTRIES", "Registry"]

INSECURE_REGISTRIES = "GANTLINE_INSECURE_REGISTRIES"
"""Variable: registries (host or host:port, separated by commas) that speak plain HTTP. Those of this machine may anyway."""

_MAX_MANIFEST_BYTES = 4 << 20
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")


class Registry:
    """One repository of a registry. Raises ConfigurationError for a Docker configuration that cannot be read."""

    def __init__(self, reference: ImageReference, label: str) -> None:
        host = "registry-1.docker.io" if reference.registry == "docker.io" else reference.registry
        self._insecure = _is_insecure(reference.registry)
        self._base = f"{'http' if self._insecure else 'https'}://{host}/v2/{reference.repository}"
        self._login = find_login(reference)
        self._client = open_client()
        self._authorization = ""
        self.service = Service(
            label, "the registry", "the credentials given may not pull it" if self._login else "no credentials were given",
            "Give a login that may pull it (docker login, or a Secret of type kubernetes.io/dockerconfigjson as the service's secretRef).",
            "has no such repository, tag or digest",
            f"Check the network and proxies; a registry without TLS must stand in {INSECURE_REGISTRIES}.",
        )  # fmt: skip

    def manifest(self, reference: str) -> tuple[str, Mapping[str, Any]]:
        """(digest, manifest) of a tag or digest. Raises SourceError; CheckpointError for what is not what its digest says."""
        headers = {"Accept": ", ".join((*_MANIFESTS, *INDEXES))}

        def attempt() -> bytes:
            with self._open(f"{self._base}/manifests/{reference}", headers) as response:
                return take(response, 0, _MAX_MANIFEST_BYTES)

        body = persist(self.service, attempt)
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if reference.startswith("sha256:") and digest != reference:
            raise CheckpointError(f"the manifest of {self.service.label} is not the one of its digest", cure="Ask the registry's operator.")
        return digest, load_json(body, f"the manifest of {self.service.label}")

    def config(self, digest: str) -> Mapping[str, Any]:
        """An image's configuration. Raises SourceError; CheckpointError for what is not what its digest says."""

        def attempt() -> bytes:
            with self._open(f"{self._base}/blobs/{digest}", {}) as response:
                return take(response, 0, _MAX_MANIFEST_BYTES)

        body = persist(self.service, attempt)
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
            raise CheckpointError(f"the configuration of {self.service.label} is not the one of its digest", cure="Push it again.")
        return load_json(body, f"the configuration of {self.service.label}")

    @contextmanager
    def open_blob(self, digest: str, start: int, end: int) -> Iterator[Iterable[bytes]]:
        """Raises Refused, Interrupted."""
        with self._open(f"{self._base}/blobs/{digest}", {"Range": f"bytes={start}-{end - 1}"}) as response:
            yield skipped(response, start)

    @contextmanager
    def _open(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """The answer to a GET; a challenge is answered once, also when a token has expired meanwhile."""
        import httpx

        for answered in (False, True):
            sent = {**headers, **({"Authorization": self._authorization} if self._authorization else {})}
            try:
                with self._client.stream("GET", url, headers=sent) as response:
                    if response.status_code in (200, 206):
                        yield response
                        return
                    challenge = parse_challenge(response.headers.get("WWW-Authenticate"))
                    if response.status_code != 401 or challenge is None or answered:
                        raise refusal_of(response)
            except httpx.TransportError as error:
                raise Interrupted(error) from None
            self._authorization = answer_challenge(self._client, challenge, self._login, insecure=self._insecure)
            if not self._authorization:
                raise Refused(401)


def _is_insecure(registry: str) -> bool:
    allowed = {item.strip() for item in os.environ.get(INSECURE_REGISTRIES, "").split(",")}
    host = registry.partition(":")[0]
    return host in ("localhost", "127.0.0.1") or registry in allowed or host in allowed
