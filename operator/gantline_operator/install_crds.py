"""Apply this version's CustomResourceDefinition: what the chart's hook runs before an installation and before an upgrade.

Server-side apply: it makes the definition, upgrades an older one, and takes over one that another release or `kubectl apply` made. The API
server itself refuses to drop a version in which objects are stored. Ends when the kind is served; whoever comes next may use it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from kubernetes.aio.config import ConfigException

from gantline_operator.client import ApiError, Client, Conflict, Object, Resource, Unavailable, connect
from gantline_operator.crd import build_crd

__all__ = ["install", "main"]

T = TypeVar("T")

_DEFINITIONS = Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")
_PAUSE_S = 0.5


async def install(client: Client, deadline: float) -> Object:
    """The definition once the API server serves it; `deadline` in seconds of the monotonic clock.

    Raises ApiError where the API server refuses, TimeoutError where it did not get so far in time.
    """
    crd = build_crd()
    live = await _persist(lambda: client.apply(_DEFINITIONS, crd), deadline)
    while not _served(live):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{crd['metadata']['name']} is not served yet: {_unmet(live)}")
        await asyncio.sleep(_PAUSE_S)
        live = await _persist(lambda: client.get(_DEFINITIONS, None, crd["metadata"]["name"]), deadline)
    return live


async def _persist(call: Callable[[], Awaitable[T]], deadline: float) -> T:
    """The answer of `call`, tried again while the API server is away or somebody else is faster."""
    while True:
        try:
            return await call()
        except (Unavailable, Conflict) as error:
            pause_s = max(error.retry_after_s, _PAUSE_S)
            if time.monotonic() + pause_s > deadline:
                raise
            await asyncio.sleep(pause_s)


def _conditions(crd: Object) -> dict[str, Object]:
    return {item["type"]: item for item in crd.get("status", {}).get("conditions") or []}


def _served(crd: Object) -> bool:
    conditions = _conditions(crd)
    return all(conditions.get(name, {}).get("status") == "True" for name in ("Established", "NamesAccepted"))


def _unmet(crd: Object) -> str:
    unmet = [f"{name}: {item.get('message', '')}" for name, item in _conditions(crd).items() if item.get("status") != "True"]
    return "; ".join(unmet) or "the API server has not looked at it"


async def _run(kubeconfig: str | None, timeout_s: float) -> Object:
    client = await connect(kubeconfig)
    try:
        return await install(client, time.monotonic() + timeout_s)
    finally:
        await client.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gantline_operator.install_crds", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timeout-seconds", type=float, default=120.0, help="give up after so many seconds (default: 120)")
    parser.add_argument("--kubeconfig", help="how to reach the cluster (default: the pod's own account, else kubectl's configuration)")
    options = parser.parse_args(arguments)
    try:
        live = asyncio.run(_run(options.kubeconfig, options.timeout_seconds))
    except (ApiError, TimeoutError, ConfigException) as error:
        print(f"gantline: the CustomResourceDefinition was not applied: {error}", file=sys.stderr)
        return 1
    print(f"{live['metadata']['name']} is served at generation {live['metadata']['generation']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
