"""Keeps a certificate: in a Secret for all replicas, and its authority in the object that the API server reads it from.

    good in the Secret ----------------------------------------> loaded, where it is not yet
    missing, old, for other names or torn apart (who leads) ---> publish the new authority beside the old one -> write the Secret -> load

In that order whatever a replica serves is trusted: the old certificate by the old authority, the new one by the new.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import logging
import random
import ssl
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from cryptography.hazmat.primitives import serialization

from gantline_operator.certificates import pairs
from gantline_operator.certificates.pairs import Pair, belongs_together, make_pair, must_renew, read_authorities
from gantline_operator.certificates.trust import Trust
from gantline_operator.client import ApiError, Client, Object, Resource

__all__ = ["Upkeep"]

_SECRETS = Resource("v1", "Secret", "secrets")

_log = logging.getLogger(__name__)

_SOON_S, _POLL_S = 2.0, 60.0


class Upkeep:
    """`run` keeps a server able to answer for `hosts`; `use` gets each certificate to answer with, and may raise ssl.SSLError. It makes
    neither the Secret (`namespace/name`) nor what is told the authority: both are the chart's. Who does not lead only uses what the Secret
    holds."""

    def __init__(
        self, client: Client, secret: str, trust: Trust, hosts: Sequence[str], use: Callable[[Pair], None], leads: Callable[[], bool]
    ) -> None:
        self._client = client
        self._namespace, _, self._secret = secret.partition("/")
        self._trust = trust
        self._hosts = hosts
        self._use = use
        self._leads = leads
        self._loaded = ""
        self._published = ""

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            try:
                await self.look()
                failures = 0
            except (ApiError, ssl.SSLError) as error:
                failures += 1
                _log.warning("The certificate for %s cannot be kept, so the API server may not connect: %s", ", ".join(self._hosts), error)
            settled = self._loaded and (self._published or not self._leads())
            delay_s = _POLL_S if settled else min(_POLL_S, _SOON_S * 2 ** min(failures, 6))
            await asyncio.sleep(delay_s * random.uniform(0.8, 1.2))

    async def look(self) -> None:
        """Once. Raises ApiError where the API server refuses."""
        secret = await self._client.get(_SECRETS, self._namespace, self._secret)
        pair = _read(secret)
        if must_renew(pair.certificate, self._hosts, datetime.now(UTC)) or not belongs_together(pair):
            if not self._leads():
                return
            pair = await self._renew(secret, pair)
        self._load(pair)
        if self._leads():
            await self._publish(pair.authority)

    async def _renew(self, secret: Object, old: Pair) -> Pair:
        new = make_pair(self._hosts, datetime.now(UTC), pairs.LIFETIME)
        pair = Pair(new.authority + _first_certificate(old.authority), new.certificate, new.key)
        await self._publish(pair.authority)
        data = {"ca.crt": pair.authority, "tls.crt": pair.certificate, "tls.key": pair.key}
        body = {
            "metadata": {"resourceVersion": secret["metadata"]["resourceVersion"]},
            "data": {key: base64.b64encode(text.encode()).decode() for key, text in data.items()},
        }
        await self._client.patch(_SECRETS, self._namespace, self._secret, body)
        _log.info("There is a new certificate for %s", ", ".join(self._hosts))
        return pair

    async def _publish(self, authority: str) -> None:
        """By server-side apply, which leaves all but `caBundle` to the chart."""
        resource = self._trust.resource
        live = await self._client.get(resource, None, self._trust.name)
        bundle = base64.b64encode(authority.encode()).decode()
        if any(found != bundle for found in self._trust.bundles(live)):
            metadata = {"name": self._trust.name, "uid": live["metadata"]["uid"]}
            whole = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata, **self._trust.naming(live, bundle)}
            await self._client.apply(resource, whole)
        self._published = authority

    def _load(self, pair: Pair) -> None:
        if pair.certificate != self._loaded:
            self._use(pair)
            self._loaded = pair.certificate


def _read(secret: Object) -> Pair:
    data = secret.get("data") or {}

    def text(key: str) -> str:
        with contextlib.suppress(binascii.Error, UnicodeDecodeError, TypeError):
            return base64.b64decode(data.get(key) or "").decode()
        return ""

    return Pair(text("ca.crt"), text("tls.crt"), text("tls.key"))


def _first_certificate(bundle: str) -> str:
    """Of the authorities, the one that signed what is served now; none of what somebody else put there."""
    found = read_authorities(bundle)
    return found[0].public_bytes(serialization.Encoding.PEM).decode() if found else ""
