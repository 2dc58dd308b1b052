"""The Kubernetes API on plain dicts: get, list, watch, create, apply, patch, delete.

Sending, credentials and their renewal are `kubernetes.aio`'s; its DynamicClient is not used, since we know every kind that we touch and
want dicts (parsing into ResourceInstance and discovery cost more than the requests).

ApiError
├── NotFound      404 of an object
├── KindMissing   404 of the kind itself: its CustomResourceDefinition is not there
├── Conflict      409: somebody was faster, the name is taken, or the object's uid is another's
├── Gone          410: a watch or a list's page is too old
├── Forbidden     401, 403: RBAC or a quota says no
├── Invalid       400, 413, 422: the object itself is refused; the same request will be refused again
└── Unavailable   429, 5xx, no connection, no answer in time: will pass
    └── Fenced    a write by an operator that no longer leads: it was not sent
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlencode
from urllib.request import getproxies

import aiohttp
import msgspec
from kubernetes.aio import config as kubernetes_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

if TYPE_CHECKING:
    import kopf

__all__ = [
    "FIELD_MANAGER",
    "UNDECLARED",
    "Api",
    "ApiError",
    "Client",
    "Conflict",
    "Fenced",
    "Forbidden",
    "Gone",
    "Head",
    "Invalid",
    "KindMissing",
    "NotFound",
    "Object",
    "Page",
    "Raw",
    "Resource",
    "Unavailable",
    "WatchEvent",
    "connect",
    "parse",
    "read_head",
    "translated",
]

FIELD_MANAGER = "gantline-operator"
Raw = msgspec.Raw
"""An object's JSON, as the server wrote it."""
UNDECLARED = "field not declared in schema"
"""What the message says where an applied object has a field that its definition lacks (strict validation says `unknown field`)."""
Object = dict[str, Any]

SILENCE_S = 75.0
"""After which a watch that says nothing may be dead: bookmarks come every minute, but of a kind that nothing has happened to."""
_REQUEST_TIMEOUT_S = 30.0
_PAGE = 100  # objects of an answer: it is held whole, and so are the pieces that it came in
_MAX_CONNECTIONS = 32
"""For requests that end. Each watch has a connection of its own besides: as many as kinds times namespaces, which would leave none."""


class ApiError(Exception):
    """An answer that is not a success. `status` is HTTP's, 0 without an answer; `retry_after_s` what the server asked for, else 0."""

    def __init__(self, message: str, *, status: int = 0, retry_after_s: float = 0.0, reason: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.reason = reason


class NotFound(ApiError):
    pass


class KindMissing(ApiError):
    pass


class Conflict(ApiError):
    pass


class Gone(ApiError):
    pass


class Forbidden(ApiError):
    pass


class Invalid(ApiError):
    pass


class Unavailable(ApiError):
    pass


class Fenced(Unavailable):
    pass


_BY_STATUS: Mapping[int, type[ApiError]] = {
    400: Invalid, 401: Forbidden, 403: Forbidden, 404: NotFound, 405: KindMissing, 409: Conflict, 410: Gone, 413: Invalid, 415: Invalid,
    422: Invalid, 429: Unavailable,
}  # fmt: skip


def translated(status: int, body: bytes, retry_after: str | None = None) -> ApiError:
    """The error for an HTTP status of 400 and above and the `Status` object that came with it."""
    answer = _json(body)
    details = answer.get("details") if isinstance(answer.get("details"), dict) else {}
    message = str(answer.get("message") or body[:300].decode(errors="replace") or f"HTTP {status}")
    error = _BY_STATUS.get(status, Unavailable if status >= 500 else Invalid)
    if error is NotFound and not (details or {}).get("name"):
        error = KindMissing  # the server names the object it lacks; without a name it lacks the path
    seconds = retry_after if retry_after is not None else str((details or {}).get("retryAfterSeconds", ""))
    return error(message, status=status, retry_after_s=float(seconds) if seconds.isdigit() else 0.0, reason=str(answer.get("reason", "")))


def _json(body: bytes) -> Object:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _object(body: bytes) -> Object:
    """What an API server answers where all is well. Raises Unavailable for less: an answer cut off on the way, or somebody else's page."""
    found = _json(body)
    if not found:
        raise Unavailable(f"The answer is no JSON object, or was cut off: {body[:100]!r}")
    return found


class Owner(msgspec.Struct):
    """An owner reference."""

    kind: str = ""
    name: str = ""
    controller: bool | None = None


class Head(msgspec.Struct, rename="camel"):
    """What tells objects apart, and whose they are. All else of an object is skipped, not parsed."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    owner_references: list[Owner] | None = None


class _Headed(msgspec.Struct):
    metadata: Head


class _PageHead(msgspec.Struct, rename={"resource_version": "resourceVersion", "token": "continue"}):
    resource_version: str = ""
    token: str = ""


class Page(msgspec.Struct):
    """A part of a list. Its objects are as the server wrote them, without apiVersion and kind: parsed they take ten times the memory."""

    metadata: _PageHead
    items: list[Raw] | None = None


class WatchEvent(msgspec.Struct):
    """ADDED, MODIFIED, DELETED or BOOKMARK, and the object as the server wrote it."""

    type: str
    object: Raw


_HEADED, _PAGES, _EVENTS = msgspec.json.Decoder(_Headed), msgspec.json.Decoder(Page), msgspec.json.Decoder(WatchEvent)


def parse(raw: Raw | bytes) -> Object:
    """An object that was listed or watched. Raises Unavailable where it is none."""
    return _object(bytes(raw))


def read_head(raw: Raw | bytes) -> Head:
    """Raises Unavailable where it is no object."""
    with _understood(raw):
        return _HEADED.decode(raw).metadata


@contextlib.contextmanager
def _understood(body: Raw | bytes) -> Iterator[None]:
    """Raises Unavailable for what is not what an API server answers: cut off on the way, or somebody else's page."""
    try:
        yield
    except msgspec.DecodeError as error:
        raise Unavailable(f"The answer is no JSON of the API, or was cut off ({error}): {bytes(body)[:100]!r}") from error


@dataclass(frozen=True)
class Resource:
    """Where the objects of one kind live."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        scope = f"/namespaces/{quote(namespace)}" if namespace else ""
        tail = f"/{quote(name)}" if name else ""
        return f"{root}{scope}/{self.plural}{tail}" + (f"/{subresource}" if subresource else "")


class Api(Protocol):
    """What a reconcile asks of the API server. Every call raises an ApiError for anything but success; `Client` says what each does."""

    async def get(self, resource: Resource, namespace: str | None, name: str, *, subresource: str = "") -> Object: ...

    async def list(self, resource: Resource, namespace: str | None = None, **query: str) -> list[Object]: ...

    async def text(self, resource: Resource, namespace: str, name: str, subresource: str, **query: str) -> str: ...

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object: ...

    async def try_out(self, resource: Resource, namespace: str, body: Object) -> Object: ...

    async def apply(self, resource: Resource, body: Object, *, subresource: str = "", force: bool = True) -> Object: ...

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, subresource: str = "", manager: str = FIELD_MANAGER
    ) -> Object: ...

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str, resource_version: str = "") -> None: ...


class Client:
    """One API server: a pool of connections, and one for each watch. Every call raises an ApiError for anything but success."""

    def __init__(self, configuration: Configuration, *, request_timeout_s: float = _REQUEST_TIMEOUT_S) -> None:
        # Where no proxy is set there is no use in asking the environment, and ~/.netrc in a thread, at every request.
        configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
        self._configuration = configuration
        self._requests, self._watches = (_connections(configuration, most) for most in (_MAX_CONNECTIONS, 0))
        self._timeout_s = request_timeout_s
        self._write_left_s: Callable[[], float] = lambda: float("inf")
        self.count: Callable[[str, int], None] = lambda method, status: None
        """Told of each request: its method, and HTTP's status or 0."""

    async def close(self) -> None:
        await self._requests.close()
        await self._watches.close()

    def sibling(self, *, request_timeout_s: float) -> Client:
        """Another client with the same credentials: connections of its own, and no fence."""
        return Client(self._configuration, request_timeout_s=request_timeout_s)

    def fence(self, left_s: Callable[[], float]) -> None:
        """From now on nothing is written that cannot be answered within `left_s()` seconds: such a write raises Fenced, unsent."""
        self._write_left_s = left_s

    async def connection_info(self) -> kopf.ConnectionInfo:
        """The same credentials for kopf, which asks again when they are refused."""
        import kopf  # here: programs that only ask need not wait for it

        configuration = self._configuration
        scheme, _, token = (await self._authorization()).get("Authorization", "").rpartition(" ")
        return kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            scheme=scheme or None,
            token=token or None,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
        )

    async def get(self, resource: Resource, namespace: str | None, name: str, *, subresource: str = "") -> Object:
        return await self._json("GET", resource.path(namespace, name, subresource))

    async def version(self) -> tuple[int, ...]:
        """The API server's, such as (1, 36)."""
        found = await self._json("GET", "/version")
        return tuple(int(digits) for part in ("major", "minor") if (digits := re.sub(r"\D.*", "", str(found.get(part, "")))))

    async def serves(self, resource: Resource) -> bool:
        """Whether the cluster knows the kind."""
        group = resource.path().rpartition("/")[0]
        try:
            found = await self._json("GET", group)
        except (KindMissing, NotFound):
            return False
        return any(item.get("name") == resource.plural for item in found.get("resources") or [])

    async def text(self, resource: Resource, namespace: str, name: str, subresource: str, **query: str) -> str:
        """The body of a subresource that is no object, such as a pod's log."""
        return (await self._send("GET", resource.path(namespace, name, subresource), query=query)).decode(errors="replace")

    async def list(self, resource: Resource, namespace: str | None = None, **query: str) -> list[Object]:
        """All objects, by pages. They come without apiVersion and kind, as the server sends them."""
        return [parse(item) async for page in self.pages(resource, namespace, **query) for item in page.items or ()]

    async def pages(self, resource: Resource, namespace: str | None = None, **query: str) -> AsyncIterator[Page]:
        token = ""
        while True:
            parameters = {"limit": str(_PAGE), **query, **({"continue": token} if token else {})}
            body = await self._send("GET", resource.path(namespace), query=parameters)
            with _understood(body):
                page = _PAGES.decode(body)
            yield page
            token = page.metadata.token
            if not token:
                return

    async def watch(
        self, resource: Resource, namespace: str | None, resource_version: str, *, timeout_s: int, **query: str
    ) -> AsyncIterator[WatchEvent]:
        """Events after `resource_version`, bookmarks among them, until the server ends the stream after `timeout_s`, or it has
        been silent for longer than bookmarks take: whoever watches on from there finds out whether the server is still there.

        Raises Gone where the version is too old.
        """
        query |= {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": resource_version, "timeoutSeconds": str(timeout_s)}
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE_S)
        async with self._response("GET", resource.path(namespace), query=query, limits=limits, over=self._watches) as response:
            with contextlib.suppress(aiohttp.SocketTimeoutError):
                async for line in _lines(response):
                    with _understood(line):
                        event = _EVENTS.decode(line)
                    if event.type == "ERROR":
                        raise translated(int(parse(event.object).get("code", 500)), bytes(event.object))
                    yield event

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        """Sent as YAML, which JSON is: the server then writes it anew in its own form. What it takes as JSON, a ControllerRevision's data
        keeps to the byte, spaces and all, and every later patch, such as the garbage collector's for `--cascade=orphan`, is then refused
        for changing them."""
        query = {"fieldManager": FIELD_MANAGER}
        return await self._json("POST", resource.path(namespace), body=json.dumps(body), query=query, content_type="application/yaml")

    async def try_out(self, resource: Resource, namespace: str, body: Object) -> Object:
        """What a creation would make: everything is judged and nothing is stored. A field that the server does not know is an error."""
        query = {"fieldManager": FIELD_MANAGER, "dryRun": "All", "fieldValidation": "Strict"}
        return await self._json("POST", resource.path(namespace), body=body, query=query)

    async def apply(self, resource: Resource, body: Object, *, subresource: str = "", force: bool = True) -> Object:
        """Server-side apply; `force` takes fields over. A `metadata.uid` in `body` guards against applying to a successor (Conflict)."""
        path = resource.path(body["metadata"].get("namespace"), body["metadata"]["name"], subresource)
        query = {"fieldManager": FIELD_MANAGER, "force": "true" if force else "false", "fieldValidation": "Strict"}
        return await self._json("PATCH", path, body=body, query=query, content_type="application/apply-patch+yaml")

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, subresource: str = "", manager: str = FIELD_MANAGER
    ) -> Object:
        """Merge patch; put uid or resourceVersion into its metadata as preconditions."""
        path = resource.path(namespace, name, subresource)
        query = {"fieldManager": manager}
        return await self._json("PATCH", path, body=body, query=query, content_type="application/merge-patch+json")

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str, resource_version: str = "") -> None:
        """Deletes exactly the object with `uid` (at `resource_version`, if given), dependents in the background. Gone already is fine."""
        preconditions = {"uid": uid, **({"resourceVersion": resource_version} if resource_version else {})}
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background", "preconditions": preconditions}
        with contextlib.suppress(NotFound):
            await self._json("DELETE", resource.path(namespace, name), body=body)

    async def _json(self, method: str, path: str, **arguments: Any) -> Object:
        return _object(await self._send(method, path, **arguments))

    async def _send(self, method: str, path: str, **arguments: Any) -> bytes:
        timeout_s = self._timeout_s if method == "GET" else min(self._timeout_s, self._write_left_s())
        if timeout_s <= 0:
            raise Fenced(f"{method} {path} was not sent: this operator no longer leads")
        limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10)
        async with self._response(method, path, limits=limits, over=self._requests, **arguments) as response:
            return await response.read()

    @contextlib.asynccontextmanager
    async def _response(
        self,
        method: str,
        path: str,
        *,
        limits: aiohttp.ClientTimeout,
        over: RESTClientObject,
        query: Mapping[str, str] | None = None,
        body: Object | str | None = None,
        content_type: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self._configuration.host + path + (f"?{urlencode(query)}" if query else "")
        headers = {"Content-Type": content_type, "Accept": "application/json", "User-Agent": FIELD_MANAGER, **await self._authorization()}
        try:
            answer = await over.request(method, url, headers=headers, body=body, _request_timeout=limits)
            async with answer.response as response:
                self.count(method, response.status)
                if response.status >= 400:
                    raise translated(response.status, await response.read(), response.headers.get("Retry-After"))
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.count(method, 0)
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}"[:500]) from error

    async def _authorization(self) -> dict[str, str]:
        """The token, read again by the loader where it is about to expire (a projected token lives for an hour)."""
        token = await self._configuration.get_api_key_with_prefix("BearerToken")
        if not token:
            return {}
        return {"Authorization": token if " " in token else f"Bearer {token}"}


def _connections(configuration: Configuration, most: int) -> RESTClientObject:
    """At most so many at once; 0: any number."""
    configuration.connection_pool_maxsize = most
    return RESTClientObject(configuration)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length: an object of a watch is one line and may exceed a reader's default limit."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line


async def connect(kubeconfig: str | None = None, context: str | None = None) -> Client:
    """A client with the pod's ServiceAccount, or with `kubeconfig` (else $KUBECONFIG, else ~/.kube/config) and its `context`."""
    configuration = Configuration()
    if kubeconfig is None and context is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        await asyncio.to_thread(kubernetes_config.load_incluster_config, client_configuration=configuration)
    else:
        file = kubeconfig or os.environ.get("KUBECONFIG")  # the library has read that when it was imported
        await kubernetes_config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
    return Client(configuration)
