"""The API custom.metrics.k8s.io/v1beta2, as the cluster's aggregator asks for it on behalf of HorizontalPodAutoscalers.

    GET /apis/custom.metrics.k8s.io/v1beta2                                                which metrics there are
    GET /apis/custom.metrics.k8s.io/v1beta2/namespaces/NS/pods/NAME-or-*/METRIC            one value for each pod whose sample is fresh

A pod without a fresh sample has no value: the autoscaler's controller counts it so that nothing shrinks for it, and holds where no pod has
any. Only the aggregator may ask: a connection has to present a client certificate of the authority, and with the name, that the API server
tells in the ConfigMap kube-system/extension-apiserver-authentication. The aggregator has authorized the user before it asks.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import web

from gantline_operator.admitting_port import AdmittingPort
from gantline_operator.autoscaling.loop import POD_METRICS, PodValue
from gantline_operator.certificates.pairs import Pair
from gantline_operator.certificates.trust import trust_of_api
from gantline_operator.certificates.upkeep import Upkeep
from gantline_operator.client import Client, Object
from gantline_operator.front_proxy import FrontProxy, FrontProxyWatch, read_front_proxy
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

    def application(self, names: Callable[[], Collection[str]]) -> web.Application:
        """For callers whose certificate has one of these common names, asked for at each request; any where there are none."""
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


def _admitting(names: Callable[[], Collection[str]]) -> Any:
    @web.middleware
    async def admit(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        subject = (request.get_extra_info("peercert") or {}).get("subject", ())
        allowed = names()
        if allowed and not any(key == "commonName" and value in allowed for part in subject for key, value in part):
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
    """Serves until cancelled, from when the API server names an authority. What it names later is for the next connections; while that
    cannot be used, and the log says so, it stays as it was. Raises OSError where the port is taken."""
    admitted = FrontProxy("")
    port = AdmittingPort(metrics.application(lambda: admitted.names), settings.listen_address, settings.custom_metrics_port)
    watch = FrontProxyWatch(client)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch.run())
        tasks.create_task(port.run())
        tasks.create_task(_keep_certificate(client, settings, port))
        while True:
            data = await watch.next()
            try:
                found = read_front_proxy(data)
                if found.authority != admitted.authority:
                    port.admit(found.authority)
                admitted = found
            except (ValueError, ssl.SSLError) as error:
                _log.warning("Who may ask for custom.metrics.k8s.io stays as it was (%s): %s", admitted.names or "nobody", error)


async def _keep_certificate(client: Client, settings: OperatorSettings, port: AdmittingPort) -> None:
    """For ever. Only who leads serves this API, so what is the operator's own may always be renewed here."""
    if settings.custom_metrics_secret:
        group, _, version = API_VERSION.partition("/")
        trust = trust_of_api(f"{version}.{group}")
        await Upkeep(client, settings.custom_metrics_secret, trust, settings.custom_metrics_hosts, port.use, lambda: True).run()
    else:
        await _follow_files(Path(settings.custom_metrics_certificate), port)


async def _follow_files(folder: Path, port: AdmittingPort) -> None:
    """Takes the certificate there, and each that replaces it, for ever."""
    used: Pair | None = None
    while True:
        try:
            pair = Pair("", (folder / "tls.crt").read_text(), (folder / "tls.key").read_text())
            if pair != used:
                port.use(pair)
                used = pair
        except (OSError, ValueError) as error:
            _log.warning("The certificate of custom.metrics.k8s.io cannot be used: %s", error)
        await asyncio.sleep(_RELOAD_S if used else _RETRY_S)
