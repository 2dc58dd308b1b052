"""Who the API server's aggregator is: the authority and the names of its client certificates, watched where the API server tells them.

The ConfigMap is kube-system/extension-apiserver-authentication. During a rotation it has both authorities, the old and the new.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass

from gantline_operator.client import Client, parse
from gantline_operator.observe import CONFIG_MAPS, Mirror

__all__ = ["FrontProxy", "FrontProxyWatch", "read_front_proxy"]

_NAMESPACE, _NAME = "kube-system", "extension-apiserver-authentication"
_REFUSED_RETRY_S = 10.0

Data = Mapping[str, str]


@dataclass(frozen=True)
class FrontProxy:
    """`authority`: PEM, of one certificate or more. `names`: one of which a client certificate has to have; none: any will do."""

    authority: str
    names: tuple[str, ...] = ()


def read_front_proxy(data: Data) -> FrontProxy:
    """What the ConfigMap says. Raises ValueError where it names no authority, or where its names are no list."""
    authority = str(data.get("requestheader-client-ca-file") or "")
    if not authority.strip():
        raise ValueError("the API server names no authority for its aggregator: start it with --requestheader-client-ca-file")
    names = json.loads(data.get("requestheader-allowed-names") or "[]")
    if not isinstance(names, list):
        raise ValueError("requestheader-allowed-names is not a list")
    return FrontProxy(authority, tuple(map(str, names)))


class FrontProxyWatch:
    """`run` follows the ConfigMap; `next` tells what it says, first and after each change."""

    def __init__(self, client: Client) -> None:
        self._mirror: Mirror[Data] = Mirror(
            client,
            CONFIG_MAPS,
            lambda raw: parse(raw).get("data") or {},
            lambda *_: self._news.set(),
            namespace=_NAMESPACE,
            name=_NAME,
            refused_retry_s=_REFUSED_RETRY_S,
        )
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        await self._mirror.run()

    async def next(self) -> Data:
        """The newest data that was not told yet; waits until there is some. Empty where there is no such ConfigMap, or no right to it."""
        await self._news.wait()
        self._news.clear()
        return next(iter((self._mirror.items or {}).values()), {})
