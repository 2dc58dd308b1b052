"""The autoscaling loop: observe, decide, write `replicas` through /scale.

Every `scaling_interval_seconds` replicas and gateways are asked and every service is decided. Where a service stands at zero, gateways are
asked every second in between, for nothing but the first held request. The loop writes no status: it tells reconciles (`targets.py`) and
asks for one when there is news. It writes only what the spec's controller leaves to Gantline, and only if the spec still is the one that
the decision was made for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from gantline_operator.autoscaling.decision import Decision, Memory, ScaleReason, decide, owned, told_load
from gantline_operator.autoscaling.exposition import add_demands, parse_demand, parse_sample
from gantline_operator.autoscaling.load import replica_load
from gantline_operator.autoscaling.observation import Demand, Observation, Replica, Sample
from gantline_operator.autoscaling.policy import Policy
from gantline_operator.autoscaling.scraping import Scraper
from gantline_operator.autoscaling.targets import Target, Targets
from gantline_operator.client import ApiError, Client, Conflict, Forbidden, NotFound, Resource
from gantline_operator.conditions import Reason
from gantline_operator.observe import PODS
from gantline_operator.pod_state import PodState, Trouble, read_pod
from gantline_operator.resources.autoscalers import LOAD_METRIC
from gantline_operator.resources.serving import SERVER_PORT
from gantline_operator.settings import OperatorSettings

__all__ = ["POD_METRICS", "SCALE_MANAGER", "Autoscaler", "PodValue"]

SCALE_MANAGER = "gantline-autoscaler"
"""Field manager of what is written through /scale."""

_log = logging.getLogger(__name__)

_SERVICES = Resource("gantline.io/v1alpha1", "InferenceService", "inferenceservices")
_GATEWAYS = "app.kubernetes.io/component=gateway,app.kubernetes.io/part-of=gantline"
_WAKE_S = 1.0
_TROUBLE_AFTER = 6
"""Looks for which metrics may be unknown before the status says so."""
_COST = "controller.kubernetes.io/pod-deletion-cost"
_MAX_COST = (1 << 31) - 1


@dataclass
class _Service:
    """What is kept of one service between decisions. Another revision is another engine: nothing that was learnt holds for it."""

    uid: str
    revision: str
    memory: Memory = field(default_factory=Memory)
    samples: dict[str, Sample] = field(default_factory=dict)
    """By the pod's uid."""
    unknown_since: float | None = None
    seen: Observation | None = None
    """What it was decided from last."""


@dataclass(frozen=True)
class PodValue:
    """One replica's value of one metric, `age_s` old."""

    service: str
    pod: str
    age_s: float
    value: float


POD_METRICS: Mapping[str, Callable[[Policy, Sample, float], float]] = {
    LOAD_METRIC: replica_load,
    "gantline_num_requests_running": lambda policy, sample, capacity: sample.running,
    "gantline_num_requests_waiting": lambda policy, sample, capacity: sample.waiting,
    "gantline_kv_cache_usage_perc": lambda policy, sample, capacity: sample.cache_usage,
}
"""What is told of pods at custom.metrics.k8s.io."""


class Autoscaler:
    def __init__(
        self,
        client: Client,
        settings: OperatorSettings,
        targets: Targets,
        *,
        enqueue: Callable[[str, str], None],
        scaled: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`enqueue` asks for a reconcile; `scaled` is told of each write: up or down."""
        self._client = client
        self._targets = targets
        self._interval_s = float(settings.scaling_interval_seconds)
        self._namespace = settings.demand_namespace
        self._gateway_port = settings.demand_port
        self._enqueue = enqueue
        self._scaled = scaled
        self._clock = clock
        self._scraper = Scraper()
        self._services: dict[str, _Service] = {}
        self._gateways: list[PodState] | None = None

    async def run(self) -> None:
        """Until cancelled. What goes wrong with one service or one look is logged, and tried again with the next."""
        async with self._scraper:
            while True:
                began = self._clock()
                try:
                    await self.look()
                    while self._clock() - began < self._interval_s:
                        at_zero = any(target.current == 0 and not target.paused for target in self._targets.all.values())
                        left_s = self._interval_s - (self._clock() - began)
                        await asyncio.sleep(max(0.0, min(_WAKE_S, left_s) if at_zero else left_s))
                        if at_zero:
                            await self.wake()
                except ApiError as error:
                    _log.warning("Autoscaling looks again in %.0f s: %s", self._interval_s, error)
                    await asyncio.sleep(self._interval_s)

    def load(self, key: str) -> float | None:
        """A service's load in replicas' worth, as KEDA asks for it (`told_load`). None also where the last look is too long ago."""
        target, service = self._targets.all.get(key), self._services.get(key)
        if target is None or service is None or service.seen is None:
            return None
        if self._clock() - service.seen.now > target.policy.stale_after_s:
            return None
        return told_load(target.policy, service.seen, service.memory)

    def pod_values(self, namespace: str, metric: str) -> Iterator[PodValue]:
        """The metric's value of each replica in a namespace whose sample is fresh. Raises KeyError for an unknown metric."""
        read = POD_METRICS[metric]
        now = self._clock()
        for key, service in self._services.items():
            target = self._targets.all.get(key)
            if target is None or target.namespace != namespace:
                continue
            for pod in target.pods:
                sample = service.samples.get(pod.uid)
                if sample is not None and now - sample.at <= target.policy.stale_after_s:
                    value = read(target.policy, sample, service.memory.capacity.of(target.policy.max_batch))
                    yield PodValue(target.name, pod.name, now - sample.at, value)

    async def look(self) -> None:
        """One look at every service. Raises ApiError where gateways cannot be listed."""
        targets = list(self._targets.all.values())
        for key in set(self._services) - {target.key for target in targets}:
            del self._services[key]
        await self._find_gateways(targets)
        demands, _ = await asyncio.gather(self._ask_gateways(), asyncio.gather(*(self._sample(target) for target in targets)))
        for target in targets:
            await self._decide_alone(target, add_demands(demands, target.key) if demands is not None else None)

    async def wake(self) -> None:
        """Looks at services at zero alone, with the gateways that the last look found."""
        demands = await self._ask_gateways()
        for target in [target for target in self._targets.all.values() if target.current == 0]:
            demand = add_demands(demands, target.key) if demands is not None else None
            if demand is not None and demand.held:
                await self._decide_alone(target, demand)

    # ---- observe ---------------------------------------------------------------------------------------------------------------------

    async def _find_gateways(self, targets: Collection[Target]) -> None:
        if not self._namespace or not targets:
            self._gateways = None
            return
        pods = [read_pod(pod) for pod in await self._client.list(PODS, self._namespace, labelSelector=_GATEWAYS)]
        self._gateways = [pod for pod in pods if pod.phase == "Running"]

    async def _ask_gateways(self) -> list[Mapping[str, Demand] | None] | None:
        """An answer for each gateway, None for one that gave none; None where nobody need be asked."""
        if self._gateways is None:
            return None
        return list(await asyncio.gather(*(self._ask_gateway(pod) for pod in self._gateways)))

    async def _ask_gateway(self, pod: PodState) -> Mapping[str, Demand] | None:
        text = await self._scraper.fetch(pod.address, self._gateway_port, "/demand")
        return parse_demand(text) if text is not None else None

    async def _sample(self, target: Target) -> None:
        service = self._service(target)
        uids = {pod.uid for pod in target.pods}
        service.samples = {uid: sample for uid, sample in service.samples.items() if uid in uids}
        await asyncio.gather(*(self._sample_pod(service, pod) for pod in target.pods if pod.phase == "Running" and pod.address))

    async def _sample_pod(self, service: _Service, pod: PodState) -> None:
        text = await self._scraper.fetch(pod.address, SERVER_PORT, "/metrics")
        sample = parse_sample(text, self._clock()) if text is not None else None
        if sample is not None:
            service.samples[pod.uid] = sample

    def _service(self, target: Target) -> _Service:
        service = self._services.get(target.key)
        if service is None or (service.uid, service.revision) != (target.uid, target.revision):
            service = self._services[target.key] = _Service(target.uid, target.revision)
        return service

    # ---- decide ----------------------------------------------------------------------------------------------------------------------

    async def _decide_alone(self, target: Target, demand: Demand | None) -> None:
        """A defect that one service brings to light must not keep the others from being looked at."""
        try:
            await self._decide(target, demand)
        except Exception:
            _log.exception("%s: its replicas are left as they are", target.key)

    async def _decide(self, target: Target, demand: Demand | None) -> None:
        service = self._service(target)
        replicas = tuple(Replica(pod.name, pod.ready, service.samples.get(pod.uid)) for pod in target.pods)
        seen = Observation(self._clock(), target.current, replicas, demand, target.rolling)
        decision, service.memory = decide(target.policy, seen, service.memory)
        service.seen = seen
        self._tell(target, self._trouble(target, service, seen, decision))
        wanted = owned(target.policy, target.current, decision)
        if wanted == target.current or target.paused:
            return
        try:
            await self._scale(target, service, wanted, decision)
        except (Conflict, NotFound):
            pass  # it changed since it was looked at: the next look decides anew
        except Forbidden as error:
            cure = "Grant the operator `patch` on inferenceservices/scale."
            self._tell(target, Trouble(Reason.FORBIDDEN, f"Replicas cannot be written: {error}"[:600], cure))
        except ApiError as error:
            _log.warning("%s is not scaled to %d yet: %s", target.key, wanted, error)

    def _trouble(self, target: Target, service: _Service, seen: Observation, decision: Decision) -> Trouble | None:
        """Only what lasts: a status must not change with every answer that is late."""
        unknown = decision.reason is ScaleReason.METRICS_UNKNOWN
        service.unknown_since = (service.unknown_since or seen.now) if unknown else None
        if service.unknown_since is not None and seen.now - service.unknown_since >= _TROUBLE_AFTER * self._interval_s:
            cure = f"See whether /metrics of the service's pods answers the operator at port {SERVER_PORT}."
            return Trouble(Reason.METRICS_UNKNOWN, "Some replica's load is not known: replicas are held as they are.", cure)
        if target.policy.min == 0 and target.policy.controller != "KEDA" and (seen.demand is None or not seen.demand.gateways):
            cure = "Install the gateway with the chart, or set scaling.min to 1."
            return Trouble(Reason.GATEWAY_MISSING, "Without a gateway nothing could wake the service: it keeps a replica.", cure)
        return None

    def _tell(self, target: Target, trouble: Trouble | None) -> None:
        if self._targets.trouble(target.key, trouble):
            self._enqueue(target.namespace, target.name)

    # ---- act -------------------------------------------------------------------------------------------------------------------------

    async def _scale(self, target: Target, service: _Service, replicas: int, decision: Decision) -> None:
        """Raises ApiError; Conflict where the service is not as it was seen.

        Another generation may have another owner of its replicas, or be suspended: what was decided is worth nothing then.
        """
        metadata = (await self._client.get(_SERVICES, target.namespace, target.name))["metadata"]
        if (metadata["uid"], metadata.get("generation", 0)) != (target.uid, target.generation):
            return
        if 0 < replicas < target.current:
            await self._mark_least_loaded(target, service)
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "spec": {"replicas": replicas}}
        await self._client.patch(_SERVICES, target.namespace, target.name, body, subresource="scale", manager=SCALE_MANAGER)
        _log.info("%s: %d -> %d replicas, %s: %s", target.key, target.current, replicas, decision.reason, decision.inputs)
        self._scaled("up" if replicas > target.current else "down")
        self._targets.scaled(target, replicas, decision.reason, decision.inputs, datetime.now(UTC))
        self._enqueue(target.namespace, target.name)

    async def _mark_least_loaded(self, target: Target, service: _Service) -> None:
        """Which pods go is the ReplicaSet's choice, by this annotation: those with the fewest requests. It only spares work: whichever pod
        goes ends its streams first."""
        try:
            await asyncio.gather(*(self._mark(target, pod, service.samples.get(pod.uid)) for pod in target.pods if not pod.deleting))
        except ApiError as error:
            _log.info("%s: pods could not be told apart by their load: %s", target.key, error)

    async def _mark(self, target: Target, pod: PodState, sample: Sample | None) -> None:
        cost = min(_MAX_COST, sample.running + sample.waiting) if sample is not None else 0
        if pod.deletion_cost == cost:
            return
        body = {"metadata": {"uid": pod.uid, "annotations": {_COST: str(cost)}}}
        with contextlib.suppress(NotFound, Conflict):  # it went by itself
            await self._client.patch(PODS, target.namespace, pod.name, body, manager=SCALE_MANAGER)
