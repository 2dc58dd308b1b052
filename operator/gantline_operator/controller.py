"""The queue's workers, the resync, and what one reconcile may know of the others: reservations of devices, conditions for /metrics.

The watches call `tell` and nothing else. `run` lists all services before the first worker starts, so that what they had planned
before a restart is reserved again before anybody plans anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from gantline_operator import resources
from gantline_operator.autoscaling.loop import Autoscaler
from gantline_operator.autoscaling.targets import Targets
from gantline_operator.cache_ledger import Ledger
from gantline_operator.child_watch import ChildWatch
from gantline_operator.client import ApiError, Client, Conflict, KindMissing, NotFound, Object, Unavailable, parse
from gantline_operator.custom_metrics import CustomMetrics, serve_custom_metrics
from gantline_operator.events import send, transitions
from gantline_operator.facts import ClusterFacts, Reservation
from gantline_operator.measuring import Measuring
from gantline_operator.metrics import Metrics
from gantline_operator.observe import ClusterView
from gantline_operator.plan import Plan, reservation
from gantline_operator.plan_status import from_status
from gantline_operator.reconcile import Reconcile
from gantline_operator.reconcile_pass import CHILD_KINDS, SERVICES, Cluster, Memory
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.settings import OperatorSettings
from gantline_operator.spec import SpecError, parse_service
from gantline_operator.survey import MAX_AGE_S, TOLD_AFTER_S, Survey, WouldWrite
from gantline_operator.workqueue import BACKOFF_CAP_S, Rank, WorkQueue

__all__ = ["Controller", "DefinitionAppeared", "Key"]

Key = tuple[str, str]
"""Namespace and name of a service."""

_log = logging.getLogger(__name__)

_SETTLE_S, _SETTLE_EVERY_S = 0.5, 5.0
"""After a change of the cluster's facts, before waiting services are planned again (changes come in crowds), and how often at most."""
_CALM_S = 0.25
"""Least time between two reconciles of one service that events ask for."""
_GRACE_S = 30.0
"""How long a cancelled reconcile may take to end before its worker counts as stuck."""
_LISTING_RETRY_S = 2.0
_UNANSWERED_CAP_S = 5.0
"""Where nobody answers, the trouble is not the service's: it need not wait longer each time, and nobody is burdened by asking."""
_INFERENCE_POOLS = next(kind for kind in CHILD_KINDS if kind.kind == "InferencePool")


class DefinitionAppeared(Exception):
    """The operator was started before its CustomResourceDefinition, and has to start anew to watch it."""


class Controller:
    def __init__(self, client: Client, settings: OperatorSettings, version: str) -> None:
        self.queue: WorkQueue[Key] = WorkQueue()
        self.metrics = Metrics()
        self.metrics.observe(lambda: (self.queue.depth, self.queue.oldest_age_s), lambda: self._conditions, lambda: self._caches)
        self.view = ClusterView(client, settings, self._facts_changed)
        self._children = ChildWatch(client, settings.watch_namespaces, self.tell)
        self.targets = Targets()
        scaled = lambda direction: self.metrics.scalings.labels(direction).inc()
        self.autoscaler = Autoscaler(client, settings, self.targets, enqueue=self.enqueue, scaled=scaled)
        client.count = lambda method, status: self.metrics.requests.labels(method, status).inc()
        self.measuring = Measuring(client, settings.calibration_configmap, told=self.enqueue)
        self._client = client
        self._settings = settings
        self._cluster = Cluster(
            client=client,
            settings=settings,
            rendering=resources.Settings.of(settings, version),
            facts=self._cluster_facts,
            fleet=self.view.fleet,
            reserve=self._reserve,
            count=lambda kind, verb: self.metrics.writes.labels(kind, verb).inc(),
            memory=self._remember,
            scaling=self.targets,
            calibration=lambda: self.measuring.calibration,
            report=lambda start: self.measuring.report(start),
            device_failed=lambda node: self.metrics.device_failures.labels(node).inc(),
            cache_seen=self._note_cache,
            cache_awaited=self._await_cache,
            evicted=self._count_eviction,
            time_plan=self.metrics.plan_duration.time,
        )
        self._reservations: dict[str, Reservation] = {}
        self._memories: dict[str, Memory] = {}
        self._conditions: dict[Key, list[Any]] = {}
        self._caches: dict[tuple[str, str], tuple[Ledger, int | None]] = {}
        self._awaiting: dict[tuple[str, str], set[Key]] = {}
        self._survey = Survey()
        self._unsettled: set[Key] = set()
        self._looked_at: dict[Key, float] = {}
        self._busy_since: dict[int, float] = {}
        self._settling: asyncio.TimerHandle | None = None
        self._settled_at = -_SETTLE_EVERY_S

    def enqueue(self, namespace: str, name: str) -> None:
        """At once for a service that was left alone for a while; else a moment later, since one write brings several events. One that
        was never seen before goes first: its owner is watching."""
        key = (namespace, name)
        if key not in self._looked_at and key not in self._conditions:
            self.queue.add(key, Rank.NEW)
            return
        since_s = time.monotonic() - self._looked_at.get(key, 0.0)
        if since_s >= _CALM_S:
            self.queue.add(key)
        else:
            self.queue.add_after(key, _CALM_S - since_s)

    def tell(self, key: Key, uid: str, version: str) -> None:
        """An event about an object of the service. Watches begin by telling of everything; what was surveyed as it is is no news, unless
        the service came after the list from which all were queued."""
        if self._survey.tell(key, uid, version) or key not in self._conditions:
            self.enqueue(*key)

    async def run(self) -> None:
        """Until cancelled. `view.run` goes on beside it, maybe for longer."""
        async with asyncio.TaskGroup() as tasks:
            await self._list_until_done()
            tasks.create_task(self._children.run())
            await self._children.known()
            tasks.create_task(self._end_first_survey(await self._take_survey()))
            await self._learn_kinds()
            await self.view.known()
            await self.measuring.load()
            tasks.create_task(self.measuring.run())
            for number in range(self._settings.workers):
                tasks.create_task(self._work(number))
            tasks.create_task(self._resync())
            tasks.create_task(self.autoscaler.run())
            if self._settings.custom_metrics_port:
                tasks.create_task(self._serve_custom_metrics())

    async def _serve_custom_metrics(self) -> None:
        metrics = CustomMetrics(self.autoscaler.pod_values, interval_s=self._settings.scaling_interval_seconds)
        await serve_custom_metrics(self._client, metrics, self._settings)

    def facts_for(self, service: str) -> ClusterFacts:
        """The cluster as a plan for `service` (`namespace/name`) would find it now, its own pods replaced."""
        return self._cluster_facts(service, self.view.pods_of(service))

    def stuck_worker(self) -> str:
        """A sentence about a worker that is past its deadline and its cancellation, else empty. The age of the queue is no sign: an
        outage of the API server lets keys wait, and a restart of the operator would not help."""
        limit_s = self._settings.reconcile_deadline_seconds + _GRACE_S
        for number, since in self._busy_since.items():
            if (busy_s := time.monotonic() - since) > limit_s:
                return f"worker {number} has been busy for {busy_s:.0f} s"
        return ""

    # ---- workers ---------------------------------------------------------------------------------------------------------------------

    async def _work(self, number: int) -> None:
        while True:
            key = await self.queue.get()
            self._busy_since[number] = self._looked_at[key] = time.monotonic()
            try:
                await self._handle(key)
            finally:
                del self._busy_since[number]
                self.queue.done(key)

    async def _handle(self, key: Key) -> None:
        """One reconcile; whatever goes wrong becomes another try, later each time."""
        try:
            with self.metrics.duration.time():
                async with asyncio.timeout(self._settings.reconcile_deadline_seconds):
                    again_s = await self.reconcile(key)
        except ApiError as error:
            self.metrics.errors.labels(type(error).__name__).inc()
            self.metrics.reconciles.labels("retry").inc()
            unanswered = isinstance(error, Unavailable) and not error.status
            cap_s = _UNANSWERED_CAP_S if unanswered else BACKOFF_CAP_S
            delay_s = self.queue.retry(key, at_least_s=error.retry_after_s, cap_s=cap_s)
            level = logging.DEBUG if isinstance(error, (Conflict, NotFound)) else logging.WARNING
            _log.log(level, "%s/%s: trying again in %.1f s: %s", *key, delay_s, error)
        except Exception as error:
            self.metrics.errors.labels(type(error).__name__).inc()
            self.metrics.reconciles.labels("error").inc()
            delay_s = self.queue.retry(key)
            _log.exception("%s/%s: trying again in %.1f s", *key, delay_s)
        else:
            self.metrics.reconciles.labels("done").inc()
            self.queue.succeed(key, again_s)

    async def reconcile(self, key: Key) -> float | None:
        """Seconds after which to look again; None if an event will do. Raises ApiError."""
        surveyed = self._survey.take(key, self._client)
        if surveyed is not None:
            try:
                return await self._reconcile(key, surveyed.parent, replace(self._cluster, client=surveyed, count=lambda kind, verb: None))
            except WouldWrite as what:
                _log.debug("%s/%s: there is something to do: %s", *key, what)
        try:
            parent = await self._client.get(SERVICES, *key)
        except NotFound:
            self._forget(key)
            return None
        return await self._reconcile(key, parent, self._cluster)

    async def _reconcile(self, key: Key, parent: Object, cluster: Cluster) -> float | None:
        if "deletionTimestamp" in parent["metadata"]:
            self._reservations.pop(_text(key), None)
            self.targets.note(_text(key), None)
            return None  # the garbage collector deletes the children by their owner reference
        one_pass = Reconcile(cluster, parent)
        if one_pass.is_new:
            # Many may have come at once, and each owner watches: all get their first child before any gets the rest.
            await one_pass.welcome()
            return 0.0
        again_s = await one_pass.run()
        self._note(key, one_pass.status)
        await send(self._client, parent, transitions(parent.get("status") or {}, one_pass.status))
        return again_s

    def _note(self, key: Key, status: Object) -> None:
        conditions = status.get("conditions") or []
        self._conditions[key] = conditions
        states = {item["type"]: item["status"] for item in conditions}
        settled = states.get("PlanResolved") == "True" and states.get("Scheduled") != "False"
        (self._unsettled.discard if settled else self._unsettled.add)(key)

    def _note_cache(self, claim: tuple[str, str], ledger: Ledger, limit_bytes: int | None) -> None:
        """A claim that nobody uses any more is nobody's to report."""
        if self._caches.get(claim, (None,))[0] != ledger:
            for key in self._awaiting.pop(claim, ()):
                self.queue.add(key)
        if ledger.users():
            self._caches[claim] = ledger, limit_bytes
        else:
            self._caches.pop(claim, None)

    def _await_cache(self, service: str, claim: str) -> None:
        namespace, _, name = service.partition("/")
        self._awaiting.setdefault((namespace, claim), set()).add((namespace, name))

    def _count_eviction(self, artefacts: int, freed_bytes: int) -> None:
        self.metrics.evictions.inc(artefacts)
        self.metrics.evicted_bytes.inc(freed_bytes)

    def _remember(self, service: str, uid: str) -> Memory:
        memory = self._memories.get(service)
        if memory is None or memory.uid != uid:
            memory = self._memories[service] = Memory(uid)
        return memory

    def _forget(self, key: Key) -> None:
        self._memories.pop(_text(key), None)
        self.targets.note(_text(key), None)
        self._looked_at.pop(key, None)
        self._conditions.pop(key, None)
        self.measuring.forget(*key)
        self._unsettled.discard(key)
        self._reservations.pop(_text(key), None)
        for claim, (ledger, limit_bytes) in list(self._caches.items()):
            if claim[0] == key[0]:
                theirs = [user for user in ledger.users() if user.rpartition(".")[0] == key[1]]
                self._note_cache(claim, ledger.without(theirs, ""), limit_bytes)
        self.queue.forget(key)

    # ---- all services ----------------------------------------------------------------------------------------------------------------

    async def _list_until_done(self) -> None:
        """Raises DefinitionAppeared where the InferenceService's definition came only now: kopf looks for kinds once, when it starts."""
        missing = False
        while True:
            try:
                await self._enqueue_all(spread_s=0.0)
                if missing:
                    raise DefinitionAppeared
                return
            except ApiError as error:
                missing = missing or isinstance(error, KindMissing)
                wait_s = max(error.retry_after_s, _LISTING_RETRY_S) * random.uniform(0.8, 1.2)
                _log.warning("InferenceServices cannot be listed, trying again in %.0f s: %s", wait_s, error)
                await asyncio.sleep(wait_s)

    async def _learn_kinds(self) -> None:
        """Whether there shall be InferencePools. Decided once: a definition that comes later is seen at the next start."""
        while True:
            try:
                pooled = self._settings.inference_pools == "true" or (
                    self._settings.inference_pools == "auto" and await self._client.serves(_INFERENCE_POOLS)
                )
                self._cluster = replace(self._cluster, pooled=pooled)
                return
            except ApiError as error:
                _log.warning("The cluster's kinds cannot be listed, trying again: %s", error)
                await asyncio.sleep(_LISTING_RETRY_S)

    async def _take_survey(self) -> Survey:
        """Spares most requests of a look at every service; one that fails spares none."""
        self._survey.close()
        self._survey = survey = Survey()
        try:
            await survey.collect(self._client, self._settings.watch_namespaces)
        except ApiError as error:
            _log.info("Children cannot be listed, they are asked for one by one: %s", error)
        return survey

    async def _end_first_survey(self, survey: Survey) -> None:
        """kopf's watch has long told which services are there. What was deleted after the survey and before it began, it did not."""
        await asyncio.sleep(TOLD_AFTER_S)
        for key in survey.untold():
            self.queue.add(key, Rank.ROUTINE)
        survey.close()

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resync_seconds * random.uniform(2 / 3, 4 / 3))
            try:
                await self._take_survey()
                await self._enqueue_all(spread_s=min(MAX_AGE_S / 2, self._settings.resync_seconds / 5))
            except ApiError as error:
                _log.warning("Resync failed, the next one will tell: %s", error)

    async def _enqueue_all(self, *, spread_s: float) -> None:
        """Every service, over `spread_s`; and those that we know but that are no more, so that they are forgotten."""
        found: set[Key] = set()
        for namespace in self._settings.watch_namespaces or (None,):
            async for page in self._client.pages(SERVICES, namespace):
                for parent in map(parse, page.items or ()):
                    key = (parent["metadata"]["namespace"], parent["metadata"]["name"])
                    found.add(key)
                    self._restore(key, parent)
        for memory in self._memories.values():
            memory.forget_checks()
        for key in found | set(self._conditions):
            self.queue.add_after(key, random.uniform(0.0, spread_s), Rank.ROUTINE)

    def _restore(self, key: Key, parent: Object) -> None:
        """What a service had planned before this operator started."""
        if _text(key) in self._reservations or key in self._conditions:
            return
        status = parent.get("status") or {}
        self._conditions[key] = status.get("conditions") or []
        try:
            _, spec = parse_service({"apiVersion": SERVICES.api_version, "kind": SERVICES.kind, **parent})
        except SpecError:
            return
        self._reserve(_text(key), spec, from_status(status.get("plan") or {}, spec))

    # ---- devices ---------------------------------------------------------------------------------------------------------------------

    def _cluster_facts(self, service: str, own_pods: Collection[str]) -> ClusterFacts:
        bound = self.view.bound_pods()
        left = ((item, item.pods - bound[name]) for name, item in self._reservations.items() if name != service)
        return self.view.facts([replace(item, pods=pods) for item, pods in left if pods > 0], own_pods)

    def _reserve(self, service: str, spec: InferenceServiceSpec, planned: Plan | None) -> None:
        pods = 0 if spec.suspend else spec.replicas
        if planned is None or not pods or not planned.placement.resource:
            self._reservations.pop(service, None)
        else:
            self._reservations[service] = reservation(service, spec, planned, pods)

    def _facts_changed(self) -> None:
        """Services without a plan, or with pods that wait, look again once the changes have settled."""
        if self._unsettled and self._settling is None:
            wait_s = max(_SETTLE_S, self._settled_at + _SETTLE_EVERY_S - time.monotonic())
            self._settling = asyncio.get_running_loop().call_later(wait_s, self._settle)

    def _settle(self) -> None:
        self._settling, self._settled_at = None, time.monotonic()
        for key in self._unsettled:
            self.queue.add(key, Rank.ROUTINE)


def _text(key: Key) -> str:
    return f"{key[0]}/{key[1]}"
