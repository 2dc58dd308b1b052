"""What discovery needs of Kubernetes' API: whole lists, and what changes after them. Credentials and their renewal are `kubernetes.aio`'s.

ApiUnavailable   no answer, or one that says to come later
├── Refused      401, 403, 404: the credentials do not reach so far, or the kind is not there
└── Expired      410: what was listed is too old to be watched from
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import getproxies

import aiohttp
import msgspec
from gantline_runtime.errors import ConfigurationError
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

__all__ = ["ApiUnavailable", "ClusterApi", "Expired", "Kind", "Object", "Refused", "connect"]

Object = dict[str, Any]

_PAGE = 500
_CONNECT_S = 10.0
_LIST_S = 60.0
_SILENCE_S = 75.0
"""Bookmarks come every minute: a watch that is silent for longer is dead."""
_WATCH_S = 300
"""After so long the server ends a watch."""


class ApiUnavailable(Exception):
    pass


class Refused(ApiUnavailable):
    pass


class Expired(ApiUnavailable):
    pass


@dataclass(frozen=True)
class Kind:
    api_version: str
    plural: str
    selector: str = ""
    """Label selector of those that are wanted."""

    def path(self, namespace: str | None) -> str:
        root = "apis" if "/" in self.api_version else "api"
        scope = f"/namespaces/{quote(namespace)}" if namespace else ""
        return f"/{root}/{self.api_version}{scope}/{self.plural}"


class ClusterApi:
    """One API server. Every call raises ApiUnavailable or one of its kinds."""

    def __init__(self, configuration: Configuration) -> None:
        # Where no proxy is set there is no use in asking the environment, and ~/.netrc in a thread, at every request.
        configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
        self._configuration = configuration
        self._rest = RESTClientObject(configuration)

    async def close(self) -> None:
        await self._rest.close()

    async def list(self, kind: Kind, namespace: str | None) -> tuple[list[Object], str]:
        """All objects, by pages, and the version from which to watch."""
        found: list[Object] = []
        token = ""
        while True:
            query = {"limit": str(_PAGE), "labelSelector": kind.selector, "continue": token}
            page = await self._page(kind.path(namespace), {name: value for name, value in query.items() if value})
            found += page.get("items") or []
            token = page.get("metadata", {}).get("continue", "")
            if not token:
                return found, str(page.get("metadata", {}).get("resourceVersion", ""))

    async def watch(self, kind: Kind, namespace: str | None, version: str) -> AsyncGenerator[Object, None]:
        """Events ({type, object}) after `version`, bookmarks among them, until the server ends the stream."""
        query = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version, "timeoutSeconds": str(_WATCH_S)}
        if kind.selector:
            query["labelSelector"] = kind.selector
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        with _translated(kind.plural):
            answer = await self._request(kind.path(namespace), query, limits)
            async with answer:
                await _check(answer)
                async for line in _lines(answer):
                    event: Object = msgspec.json.decode(line)
                    if event.get("type") == "ERROR":
                        status = event.get("object", {})
                        raise _error(int(status.get("code", 500)), str(status.get("message", "")))
                    yield event

    async def _page(self, path: str, query: dict[str, str]) -> Object:
        limits = aiohttp.ClientTimeout(total=_LIST_S, sock_connect=_CONNECT_S)
        with _translated(path):
            answer = await self._request(path, query, limits)
            async with answer:
                await _check(answer)
                page: Object = msgspec.json.decode(await answer.read())
                return page

    async def _request(self, path: str, query: dict[str, str], limits: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", "User-Agent": "gantline-gateway"}
        token = await self._configuration.get_api_key_with_prefix("BearerToken")  # read again where it is about to expire
        if token:
            headers["Authorization"] = token if " " in token else f"Bearer {token}"
        url = f"{self._configuration.host}{path}?{urlencode(query)}"
        answer = await self._rest.request("GET", url, headers=headers, _request_timeout=limits)
        response: aiohttp.ClientResponse = answer.response
        return response


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status >= 400:
        raise _error(answer.status, (await answer.text(errors="replace"))[:300])


def _error(status: int, message: str) -> ApiUnavailable:
    kind = Expired if status == 410 else Refused if status in (401, 403, 404) else ApiUnavailable
    return kind(f"the API server answered {status}: {message}")


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
        raise ApiUnavailable(f"{what}: {type(error).__name__}: {error}"[:500]) from error


async def _lines(answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """Lines of any length: an object of a watch is one line and may exceed a reader's default limit."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line


async def connect(kubeconfig: str | None = None) -> ClusterApi:
    """With the pod's ServiceAccount, or with `kubeconfig` (else $KUBECONFIG, else ~/.kube/config). Raises ConfigurationError."""
    configuration = Configuration()
    try:
        if kubeconfig is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            file = kubeconfig or os.environ.get("KUBECONFIG")  # the library has read that when it was imported
            await kubernetes_config.load_kube_config(config_file=file, client_configuration=configuration)
    except kubernetes_config.ConfigException as error:
        cure = "Run it in a pod, set KUBECONFIG, or name services in a file with --services."
        raise ConfigurationError(f"no API server is known: {error}", cure=cure) from None
    return ClusterApi(configuration)
