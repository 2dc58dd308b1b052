"""Who we are to a registry: the credentials of a Docker configuration, and the tokens that a registry's challenge sends us for.

    $DOCKER_AUTH_CONFIG            the configuration itself, as a Secret of type kubernetes.io/dockerconfigjson holds it
    $DOCKER_CONFIG/config.json     else this file (default ~/.docker)

Only `auths` is read: no credential helper is run.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gantline_runtime.checkpoint.files import MAX_JSON_BYTES, load_json
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.sources.patience import Interrupted, Refused
from gantline_runtime.sources.uri import ImageReference
from gantline_runtime.sources.web import refusal_of

if TYPE_CHECKING:
    import httpx

__all__ = ["Challenge", "Login", "answer_challenge", "find_login", "parse_challenge"]

_DOCKER_HUB = ("index.docker.io", "registry-1.docker.io", "docker.io")
_MAX_TOKEN_BYTES = 1 << 20
_PARAMETER = re.compile(r'([A-Za-z]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


@dataclass(frozen=True)
class Login:
    """A user's name and password, or an identity token in their place. Nothing set: nobody."""

    user: str = ""
    password: str = ""
    identity_token: str = ""

    def __bool__(self) -> bool:
        return bool(self.user or self.identity_token)

    @property
    def basic(self) -> str:
        """The value of an `Authorization` header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


@dataclass(frozen=True)
class Challenge:
    """What `WWW-Authenticate` asks for. `realm` is empty for Basic."""

    realm: str = ""
    service: str = ""
    scope: str = ""


def find_login(reference: ImageReference) -> Login:
    """The credentials for a repository; of several that match, those of the longest path. Raises ConfigurationError."""
    auths = _read_configuration().get("auths")
    hosts = _DOCKER_HUB if reference.registry in _DOCKER_HUB else (reference.registry,)
    found: tuple[int, Any] = (-1, None)
    for key, entry in auths.items() if isinstance(auths, dict) else ():
        address = re.sub(r"/v[12]$", "", re.sub(r"^https?://", "", key).rstrip("/"))
        host, _, path = address.partition("/")
        if host in hosts and (not path or f"{reference.repository}/".startswith(f"{path}/")) and len(path) > found[0]:
            found = len(path), entry
    return _parse_entry(found[1]) if isinstance(found[1], dict) else Login()


def _read_configuration() -> Mapping[str, Any]:
    try:
        text = os.environ.get("DOCKER_AUTH_CONFIG", "").strip()
        if text:
            return load_json(text.encode(), "DOCKER_AUTH_CONFIG")
        path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            return {}
        return load_json(path.read_bytes(), str(path))
    except (CheckpointError, OSError, RuntimeError) as error:
        # The decoder's own message may quote what it read.
        raise ConfigurationError(
            f"the Docker configuration cannot be read ({type(error).__name__})",
            cure="Make the Secret by `kubectl create secret docker-registry`, or correct $DOCKER_CONFIG/config.json.",
        ) from None


def _parse_entry(entry: Mapping[str, Any]) -> Login:
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if not user and entry.get("auth"):
        try:
            user, _, password = base64.b64decode(str(entry["auth"])).decode().partition(":")
        except ValueError:
            raise ConfigurationError(
                "an `auth` of the Docker configuration is not base64", cure="Make the Secret by `kubectl create secret docker-registry`."
            ) from None
    return Login(user, password.rstrip("\0"), str(entry.get("identitytoken") or ""))


def parse_challenge(header: str | None) -> Challenge | None:
    """None for a scheme that is not known."""
    scheme, _, rest = (header or "").partition(" ")
    if scheme.lower() == "basic":
        return Challenge()
    if scheme.lower() != "bearer":
        return None
    values = {name.lower(): quoted or plain for name, quoted, plain in _PARAMETER.findall(rest[:4096])}
    return Challenge(values["realm"], values.get("service", ""), values.get("scope", "")) if values.get("realm") else None


def answer_challenge(client: httpx.Client, challenge: Challenge, login: Login, *, insecure: bool) -> str:
    """The value for `Authorization`, empty where nobody is asked for Basic. Raises Refused, Interrupted.

    Credentials go to the realm that the registry names, as the protocol has it, but never over plain HTTP unless the registry itself does.
    """
    import httpx

    if not challenge.realm:
        return login.basic if login else ""
    if urlsplit(challenge.realm).scheme not in (("http", "https") if insecure else ("https",)):
        raise Refused(401, code="InsecureRealm")
    values = {"service": challenge.service, "scope": challenge.scope}
    try:
        if login.identity_token:
            form = {**values, "grant_type": "refresh_token", "client_id": "gantline", "refresh_token": login.identity_token}
            response = client.post(challenge.realm, data=form)
        else:
            headers = {"Authorization": login.basic} if login else {}
            response = client.get(challenge.realm, params={key: value for key, value in values.items() if value}, headers=headers)
    except httpx.TransportError as error:
        raise Interrupted(error) from None
    if response.status_code != 200:
        raise refusal_of(response)
    return f"Bearer {_token_of(response.content[:_MAX_TOKEN_BYTES])}"


def _token_of(body: bytes) -> str:
    try:
        values = json.loads(body)
        token = values.get("token") or values.get("access_token")
    except (ValueError, AttributeError):
        token = None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise Refused(401, code="NoToken")
    return token
