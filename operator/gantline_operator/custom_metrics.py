"""The API custom.metrics.k8s.io/v1beta2, as the cluster's aggregator asks for it on behalf of HorizontalPodAutoscalers.

    GET /apis/custom.metrics.k8s.io/v1beta2                                                which metrics there are
    GET /apis/custom.metrics.k8s.io/v1beta2/namespaces/NS/pods/NAME-or-*/METRIC            one value for each pod whose sample is fresh

A pod without a fresh sample has no value: the autoscaler's controller counts it so that nothing shrinks for it, and holds where no pod has
any. Only the aggregator may ask: a connection has to present a client certificate of the authority, and with the name, that the API server
tells in the ConfigMap kube-system/extension-apiserver-authentication. The aggregator has authorized the user before it asks.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import web

from gantline_operator.autoscaling.loop import POD_METRICS, PodValue
from gantline_operator.certificates.trust import trust_of_api
from gantline_operator.certificates.upkeep import Upkeep
from gantline_operator.client import ApiError, Client, Object
from gantline_operator.observe import CONFIG_MAPS
from gantline_operator.resources.naming import pod_selector
from gantline_operator.settings import OperatorSettings

__all__ = ["API_VERSION", "CustomMetrics", "serve_custom_metrics"]

API_VERSION = "custom.metrics.k8s.io/v1beta2"

_log = logging.getLogger(__name__)

_ROOT = f"/apis/{API_VERSION}"
_RELOAD_S = 60.0
_RETRY_S = 10.0
_TERM = re.compile(r"\s*([A-Za-z0-9./_-]{1,317})\s*={1,2}\s*([A-Za-z0-9._-]{0,63})\s*")

Values = Callable[[str, str], Iterator[PodValue]]
"""(namespace, metric) -> values. Raises KeyError for an unknown metric."""


class CustomMetrics:
    """The two answers, over HTTP."""

    def __init__(self, values: Values, *, interval_s: float) -> None:
        self._values = values
        self._window_s = max(1, int(interval_s))

    def application(self, names: Collection[str]) -> web.Application:
        """For callers whose certificate has one of these common names; any where there are none."""
        application = web.Application(client_max_size=1 << 10, middlewares=[_admitting(names)])
        application.router.add_get(_ROOT, self._list)
        application.router.add_get(_ROOT + "/namespaces/{namespace}/pods/{name}/{metric}", self._pods)
        return application

    async def _list(self, request: web.Request) -> web.Response:
        shape = {"singularName": "", "namespaced": True, "kind": "MetricValueList", "verbs": ["get"]}
        listed = [{"name": f"pods/{metric}", **shape} for metric in sorted(POD_METRICS)]
        return web.json_response({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": API_VERSION, "resources": listed})

    async def _pods(self, request: web.Request) -> web.Response:
        namespace, name, metric = (request.match_info[key] for key in ("namespace", "name", "metric"))
        try:
            wanted = _terms(request.query.get("labelSelector", ""))
            found = [value for value in self._values(namespace, metric) if _selects(wanted, value, name)]
        except KeyError:
            return _failure(404, "NotFound", f"there is no metric {metric[:64]!r} of pods")
        except ValueError as error:
            return _failure(400, "BadRequest", str(error))
        if name != "*" and not found:
            return _failure(404, "NotFound", f"metric {metric} of pod {name[:253]!r} is not known")
        items = [self._item(namespace, metric, value) for value in found]
        return web.json_response({"kind": "MetricValueList", "apiVersion": API_VERSION, "metadata": {}, "items": items})

    def _item(self, namespace: str, metric: str, value: PodValue) -> Object:
        taken = datetime.now(UTC) - timedelta(seconds=value.age_s)
        return {
            "describedObject": {"kind": "Pod", "apiVersion": "/v1", "namespace": namespace, "name": value.pod},
            "metric": {"name": metric},
            "timestamp": taken.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "windowSeconds": self._window_s,
            "value": f"{round(value.value * 1000)}m",
        }


def _admitting(names: Collection[str]) -> Any:
    @web.middleware
    async def admit(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        subject = (request.get_extra_info("peercert") or {}).get("subject", ())
        if names and not any(key == "commonName" and value in names for part in subject for key, value in part):
            return _failure(403, "Forbidden", "only the API server's aggregator may ask")
        return await handler(request)

    return admit


def _terms(selector: str) -> dict[str, str]:
    """Equality terms of a label selector, as a scale subresource's selector has them. Raises ValueError for any other."""
    if not selector.strip():
        return {}
    matches = [_TERM.fullmatch(part) for part in selector.split(",")]
    if None in matches:
        raise ValueError("only terms of the form key=value are understood in labelSelector")
    return {match[1]: match[2] for match in matches if match is not None}


def _selects(wanted: dict[str, str], value: PodValue, name: str) -> bool:
    marks = pod_selector(value.service, "server")
    return name in ("*", value.pod) and all(marks.get(key) == text for key, text in wanted.items())


def _failure(code: int, reason: str, message: str) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message}
    return web.json_response(status, status=code)


async def serve_custom_metrics(client: Client, metrics: CustomMetrics, settings: OperatorSettings) -> None:
    """Serves until cancelled. While the authority or a certificate that is given is not there, it is tried again, and the log says so."""
    while True:
        try:
            authority, names = await read_authority(client)
            context = build_context(authority)
            if not settings.custom_metrics_secret:
                _load(context, Path(settings.custom_metrics_certificate))
            break
        except (ApiError, OSError, ValueError) as error:
            _log.warning("custom.metrics.k8s.io is not served yet, trying again in %.0f s: %s", _RETRY_S, error)
            await asyncio.sleep(_RETRY_S)
    runner = web.AppRunner(metrics.application(names), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.listen_address, settings.custom_metrics_port, ssl_context=context).start()
        await _keep_certificate(client, settings, context)
    finally:
        await runner.cleanup()


async def _keep_certificate(client: Client, settings: OperatorSettings, context: ssl.SSLContext) -> None:
    """For ever. Only who leads serves this API, so what is the operator's own may always be renewed here."""
    if settings.custom_metrics_secret:
        group, _, version = API_VERSION.partition("/")
        trust = trust_of_api(f"{version}.{group}")
        await Upkeep(client, settings.custom_metrics_secret, trust, settings.custom_metrics_hosts, context, lambda: True).run()
    else:
        await _reload(context, Path(settings.custom_metrics_certificate))


async def read_authority(client: Client) -> tuple[str, list[str]]:
    """The authority of the aggregator's client certificates, PEM, and the names that they may have (none: any).

    Raises ApiError, and ValueError where the API server names no authority.
    """
    found = await client.get(CONFIG_MAPS, "kube-system", "extension-apiserver-authentication")
    data = found.get("data") or {}
    authority = data.get("requestheader-client-ca-file", "")
    if not authority.strip():
        raise ValueError("the API server names no authority for its aggregator: start it with --requestheader-client-ca-file")
    return str(authority), [str(name) for name in json.loads(data.get("requestheader-allowed-names") or "[]")]


def build_context(authority: str) -> ssl.SSLContext:
    """TLS that admits only who shows a certificate of `authority`; it has none itself yet. Raises OSError for what is no authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=authority)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(context: ssl.SSLContext, folder: Path) -> None:
    """Raises OSError, also for what is no certificate."""
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")


async def _reload(context: ssl.SSLContext, folder: Path) -> None:
    """Takes a renewed certificate for new connections, for ever."""
    last = _stamp(folder)
    while True:
        await asyncio.sleep(_RELOAD_S)
        if (now := _stamp(folder)) == last:
            continue
        try:
            _load(context, folder)
            last = now
        except OSError as error:
            _log.warning("The renewed certificate of custom.metrics.k8s.io cannot be used: %s", error)


def _stamp(folder: Path) -> tuple[Any, ...]:
    try:
        return tuple((folder / name).stat().st_mtime_ns for name in ("tls.crt", "tls.key"))
    except OSError:
        return ()
