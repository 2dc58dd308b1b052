"""A small HTTPS client for an API server: what the cluster itself needs of Kubernetes' API, without a client library."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gantline_devcluster.errors import DevclusterError


class ApiError(DevclusterError):
    """The API server refused; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the API server answered {status}: {message}", "Look into kube-apiserver's log")
        self.status = status


class Client:
    """One connection to one API server, reopened when it breaks; not to be shared by threads."""

    def __init__(self, kubeconfig: Path, timeout_s: float = 30.0) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._context = ssl.create_default_context(cadata=authority)
        self._address = urllib.parse.urlsplit(cluster["server"])
        self._token = config["users"][0]["user"]["token"]
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPSConnection | None = None

    def get(self, path: str) -> Any:
        return self.call("GET", path)

    def post(self, path: str, body: Any) -> Any:
        return self.call("POST", path, body)

    def apply(self, path: str, body: Any, manager: str = "gantline-devcluster") -> Any:
        """Server-side apply of one object at its own path."""
        return self.call("PATCH", f"{path}?fieldManager={manager}&force=true", body, content_type="application/apply-patch+yaml")

    def call(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> Any:
        """One request; returns the decoded answer. Raises ApiError, or OSError where there is no connection."""
        data = None if body is None else json.dumps(body)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": content_type, "Accept": "application/json"}
        reused = self._connection is not None
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(
                self._address.hostname or "", self._address.port, timeout=self._timeout_s, context=self._context
            )
        try:
            self._connection.request(method, path, data, headers)
            answer = self._connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if reused:  # the server had closed the kept connection, or was restarted: a new one decides
                return self.call(method, path, body, content_type=content_type)
            raise OSError(f"no answer from {self._address.netloc}: {error}") from error
        if answer.status >= 400:
            raise ApiError(answer.status, _message(text))
        return json.loads(text) if text.startswith("{") else text

    def watch(self, path: str, resource_version: str, timeout_s: int = 240) -> Iterator[dict[str, Any]]:
        """The events of a list's `path` from `resource_version` on, until the server ends the stream. Raises ApiError (410: list again)."""
        connection = http.client.HTTPSConnection(
            self._address.hostname or "", self._address.port, timeout=timeout_s + 30, context=self._context
        )
        join = "&" if "?" in path else "?"
        query = f"{path}{join}watch=1&allowWatchBookmarks=true&resourceVersion={resource_version}&timeoutSeconds={timeout_s}"
        try:
            connection.request("GET", query, headers={"Authorization": f"Bearer {self._token}"})
            answer = connection.getresponse()
            if answer.status >= 400:
                raise ApiError(answer.status, _message(answer.read().decode()))
            for line in answer:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(event["object"].get("code", 500), event["object"].get("message", ""))
                yield event
        finally:
            connection.close()

    def ready(self) -> bool:
        try:
            return bool(self.call("GET", "/readyz") == "ok")
        except (ApiError, OSError):
            return False

    def wait_ready(self, timeout_s: float, alive: Any = None) -> None:
        """Wait for /readyz. `alive` may raise to end the wait early. Raises DevclusterError."""
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if alive:
                alive()
            if time.monotonic() > deadline:
                raise DevclusterError(f"the API server was not ready within {timeout_s:.0f} s", "Look into kube-apiserver's log")
            time.sleep(0.1)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _message(text: str) -> str:
    try:
        return str(json.loads(text).get("message", text))
    except ValueError:
        return text.strip()[:500]
