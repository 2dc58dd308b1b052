"""`gantline-operator`: settings, one API client, one controller, kopf to watch, and a Lease where several replicas run.

kopf runs without change handlers, so it writes nothing; everything it tells us is a key for the queue. Its peering is no leader election:
two of a priority pause each other. Of several replicas the one that holds a Lease works (`leadership.py`); the others wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import kopf
from gantline_runtime import termination
from gantline_runtime.errors import ConfigurationError

from gantline_operator.background import beside
from gantline_operator.client import SILENCE_S, Client, connect
from gantline_operator.controller import Controller, DefinitionAppeared
from gantline_operator.handlers import register
from gantline_operator.health import build_health
from gantline_operator.leadership import Leadership, LeadershipLost
from gantline_operator.relay import ask_leader, relaying
from gantline_operator.settings import OperatorSettings, from_environment
from gantline_operator.web import build_application, serving_http
from gantline_operator.webhook.service import serving_webhook
from gantline_operator.workqueue import RETURN_S

__all__ = ["Backoffs", "kopf_settings", "main", "operate", "version"]

_log = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Backoffs:
    """Seconds between kopf's attempts: for ever, since a finite list would end the process in an outage of the API server; capped, and with
    jitter, so that watches do not come back in step."""

    def __init__(self, cap_s: float = RETURN_S) -> None:
        self._cap_s = cap_s

    def __iter__(self) -> Iterator[float]:
        delay_s = 0.5
        while True:
            yield delay_s * random.uniform(0.5, 1.0)
            delay_s = min(self._cap_s, delay_s * 2)


class NoDiffs(kopf.DiffBaseStorage):
    """kopf compares every object with its last state, also where no handler asks for it, and copies it twice for that: 5 ms an event."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return cast(kopf.BodyEssence, {})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None


def version() -> str:
    """Of the installed distribution; operator and runtime share it."""
    return importlib.metadata.version("gantline")


def kopf_settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.networking.error_backoffs = Backoffs()
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = 10
    settings.watching.server_timeout = 300
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = SILENCE_S
    settings.watching.chunk_size = 100
    # Needs no right to read definitions and namespaces. A definition that comes late is noticed by the controller's own listing.
    settings.scanning.disabled = True
    settings.queueing.idle_timeout = 1.0
    settings.queueing.exit_timeout = 0.5  # handlers only enqueue: nothing is worth waiting for
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.persistence.finalizer = "gantline.io/operator"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix="gantline.io")
    settings.persistence.diffbase_storage = NoDiffs()
    return settings


async def operate(
    settings: OperatorSettings,
    client: Client,
    stop: asyncio.Event,
    *,
    build: Callable[[Client, OperatorSettings, str], Controller] = Controller,
) -> None:
    """Runs until `stop` is set or a signal comes. Raises what ended it otherwise: the process then ends, and the kubelet starts another.

    With a Lease it looks at nodes and pods and answers probes from the beginning, and works as soon as it leads.
    """
    controller = build(client, settings, version())
    async with contextlib.AsyncExitStack() as stack:
        leadership = _leadership(settings, client) if settings.lease else None
        leads = leadership.leads if leadership else lambda: True
        controller.metrics.observe_leader(leads)

        async def elsewhere(path: str) -> tuple[int, bytes] | None:
            if leadership is None or leads() or not leadership.leader:
                return None
            return await ask_leader(leadership.leader, settings.metrics_port, path)

        web = build_application(controller.metrics.registry, controller.autoscaler.load, elsewhere)
        await stack.enter_async_context(serving_http(web, settings.listen_address, settings.metrics_port))
        health = build_health(controller.stuck_worker, leads)
        await stack.enter_async_context(serving_http(health, settings.listen_address, settings.health_port))
        if settings.webhook_port:
            await stack.enter_async_context(serving_webhook(settings, client, controller, leads, stop))
        view = await stack.enter_async_context(beside(controller.view.run(), stop))
        if leadership is not None:
            stack.push_async_callback(leadership.release)
            client.fence(leadership.left_s)
            async with relaying(settings.listen_address, settings.custom_metrics_port, lambda: leadership.leader):
                if not await leadership.acquire(stop):
                    return
            await stack.enter_async_context(beside(leadership.keep(), stop))
        work = await stack.enter_async_context(beside(controller.run(), stop))
        await _watch(settings, client, controller, stop, (view, work))


def _leadership(settings: OperatorSettings, client: Client) -> Leadership:
    return Leadership(client, settings.lease, settings.identity, settings.lease_seconds, address=settings.address)


async def _watch(
    settings: OperatorSettings,
    client: Client,
    controller: Controller,
    stop: asyncio.Event,
    ours: Sequence[asyncio.Task[None]],
) -> None:
    """kopf, until `stop`."""
    registry = kopf.OperatorRegistry()
    register(registry, controller.tell)

    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await client.connection_info()

    async def cleanup(**_: Any) -> None:
        for task in ours:
            task.cancel()  # kopf would wait for what they began, which never ends by itself
        stop.set()  # after a signal kopf still waits for this, five seconds long

    kopf.on.login(id="login", registry=registry)(login)
    kopf.on.cleanup(id="ours", registry=registry)(cleanup)
    await kopf.operator(
        registry=registry,
        settings=kopf_settings(),
        clusterwide=not settings.watch_namespaces,
        namespaces=settings.watch_namespaces,
        standalone=True,
        stop_flag=stop,
    )


def main(arguments: list[str] | None = None) -> int:
    """The operator's process; its exit code."""
    try:
        settings = from_environment(os.environ, sys.argv[1:] if arguments is None else arguments)
    except ConfigurationError as error:
        print(f"gantline-operator: {error}. {error.cure}", file=sys.stderr)
        termination.write(termination.TerminationMessage(error.reason, str(error), error.cure))
        return termination.exit_code(error.reason)
    configure_logging(settings.log_level)
    collect_garbage_seldom()
    return asyncio.run(_run(settings))


async def _run(settings: OperatorSettings) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # until kopf takes them over: a container's first process ignores them otherwise
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    client = await connect()
    scope = ", ".join(settings.watch_namespaces) or "all namespaces"
    _log.info("gantline-operator %s serves %s", version(), scope)
    code = 0
    try:
        await operate(settings, client, stop)
    except* DefinitionAppeared:
        _log.info("The definition of InferenceService has appeared: ending, to be started anew and watch it")
    except* LeadershipLost as lost:
        _log.error("Ending, to be started anew and wait: %s", "; ".join(map(str, lost.exceptions)))
        code = 1
    finally:
        await client.close()
    return code


def collect_garbage_seldom() -> None:
    """Objects of the API are trees, freed as they are let go; each of them makes hundreds of containers, for which CPython would look for
    cycles among all that lives: two fifths of a restart's processor time with 500 services."""
    gc.collect()
    gc.freeze()  # the modules stay
    gc.set_threshold(50_000, 10, 10)


def configure_logging(level: str) -> None:
    """One line a record on stderr. kopf logs every event at info, which doubles the CPU that the operator needs."""
    logging.basicConfig(level=level.upper(), format=_FORMAT, stream=sys.stderr, force=True)
    quiet = logging.DEBUG if level == "debug" else logging.WARNING
    for name in ("kopf", "asyncio", "aiohttp", "kubernetes"):
        logging.getLogger(name).setLevel(quiet)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # kopf takes it over once the loop runs; before, the default is quick
    sys.exit(main())
