"""Asks each revision's first ready pod how its start went, once, beside the reconciles; and keeps what was learnt in a ConfigMap.

A pod that cannot be reached (a network that keeps the operator out, an operator outside the cluster) is asked three times and then left
alone: its service goes without the phases of its start, and plans go by the formula.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from gantline_operator.autoscaling.scraping import Scraper
from gantline_operator.calibration import Calibration, Measurement, PodReport, later, measure, parse, read_report, render
from gantline_operator.client import ApiError, Client, Conflict, Object
from gantline_operator.observe import CONFIG_MAPS
from gantline_operator.resources.serving import SERVER_PORT

__all__ = ["Measuring", "Start"]

_log = logging.getLogger(__name__)

_TRIES = 3
_RETRY_S = 2.0
_TIMEOUT_S = 2.0
_DATA = "measurements"
_SAVE_AFTER_S = 1.0
"""A rollout of many services is one write."""


@dataclass(frozen=True)
class Start:
    """A pod that has just become ready. `key` is what its plan is known by in the calibration; empty where nothing is to be learnt."""

    namespace: str
    service: str
    revision: str
    address: str
    key: str
    load_s: float
    """From the container's start to ready."""
    ready_at: str


class Measuring:
    """Reports by service and revision, and the calibration."""

    def __init__(self, client: Client, config_map: str, *, told: Callable[[str, str], None], retry_s: float = _RETRY_S) -> None:
        """`config_map` is `namespace/name`; empty: what is learnt lasts as long as the process. `told` (namespace, service) of a report."""
        self.calibration = Calibration()
        self._client = client
        self._namespace, _, self._name = config_map.partition("/")
        self._told = told
        self._retry_s = retry_s
        self._reports: dict[tuple[str, str], tuple[str, PodReport | None]] = {}
        self._starts: asyncio.Queue[Start] = asyncio.Queue()
        self._changed = asyncio.Event()

    def report(self, start: Start) -> PodReport | None:
        """What the pod said; None while it was not asked, when it is, and where it did not answer."""
        key = (start.namespace, start.service)
        revision, report = self._reports.get(key, ("", None))
        if revision != start.revision:
            self._reports[key] = start.revision, None
            self._starts.put_nowait(start)
            return None
        return report

    def forget(self, namespace: str, service: str) -> None:
        self._reports.pop((namespace, service), None)

    async def run(self) -> None:
        """Until cancelled."""
        async with Scraper(timeout_s=_TIMEOUT_S) as scraper, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep())
            while True:
                tasks.create_task(self._ask(scraper, await self._starts.get()))

    async def _ask(self, scraper: Scraper, start: Start) -> None:
        for attempt in range(_TRIES):
            await asyncio.sleep(self._retry_s * attempt)
            text = await scraper.fetch(start.address, SERVER_PORT, "/metrics")
            report = read_report(text) if text is not None else None
            # The engine's own numbers come twice a second, the first a moment after the pod is ready.
            if report is not None and report.phases and (report.reserved or attempt == _TRIES - 1):
                self._take(start, report)
                return
        _log.info("%s/%s: its pod does not tell how it started", start.namespace, start.service)

    def _take(self, start: Start, report: PodReport) -> None:
        key = (start.namespace, start.service)
        if self._reports.get(key, ("",))[0] != start.revision:
            return  # another revision came meanwhile, or the service went
        self._reports[key] = start.revision, report
        if start.key:
            self.note(start.key, measure(report, start.load_s, start.ready_at))
        self._told(start.namespace, start.service)

    def note(self, key: str, measured: Measurement) -> None:
        self.calibration = self.calibration.noted(key, measured)
        self._changed.set()

    # ---- the ConfigMap

    async def load(self) -> None:
        """What earlier operators learnt. Not there, or not readable: nothing."""
        if self._name:
            try:
                self.calibration = later(self.calibration, parse(_text(await self._get())))
            except ApiError as error:
                _log.warning("ConfigMap %s/%s cannot be read, plans go by the formula: %s", self._namespace, self._name, error)

    async def _keep(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(_SAVE_AFTER_S)
            self._changed.clear()
            if self._name:
                try:
                    await self._save()
                except Conflict:
                    self._changed.set()
                except ApiError as error:
                    lasts = "what was learnt lasts as long as this process"
                    _log.warning("ConfigMap %s/%s cannot be written, %s: %s", self._namespace, self._name, lasts, error)

    async def _save(self) -> None:
        """Raises Conflict where another operator wrote meanwhile."""
        found = await self._get()
        self.calibration = later(parse(_text(found)), self.calibration)
        text = render(self.calibration)
        if text != _text(found):
            guard = {"resourceVersion": found["metadata"]["resourceVersion"]}
            await self._client.patch(CONFIG_MAPS, self._namespace, self._name, {"metadata": guard, "data": {_DATA: text}})

    async def _get(self) -> Object:
        return await self._client.get(CONFIG_MAPS, self._namespace, self._name)


def _text(config_map: Object) -> str:
    return str((config_map.get("data") or {}).get(_DATA, ""))
