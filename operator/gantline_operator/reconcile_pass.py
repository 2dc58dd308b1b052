"""What every step of a reconcile shares: the service, its children as seen, what was found, and the status that is written from it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from gantline_operator import resources
from gantline_operator.apply import Child, Children, Problem, Version
from gantline_operator.apply import Parent as ApplyParent
from gantline_operator.autoscaling.policy import Policy, build_policy
from gantline_operator.autoscaling.targets import Target, Targets
from gantline_operator.cache_ledger import Ledger
from gantline_operator.calibration import Calibration, PodReport
from gantline_operator.client import UNDECLARED, Api, ApiError, Conflict, Object, Resource
from gantline_operator.facts import ClusterFacts
from gantline_operator.measuring import Start
from gantline_operator.observe import PODS
from gantline_operator.plan import Plan
from gantline_operator.pod_state import PodState, read_pod
from gantline_operator.replacement import Replacements
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.settings import OperatorSettings
from gantline_operator.stages import Record
from gantline_operator.status import Findings, build_status, read_rollout

__all__ = ["CHILD_KINDS", "OPTIONAL_KINDS", "SERVICES", "Cluster", "Memory", "Pass", "is_paused", "policy_of", "sentence"]

SERVICES = Resource("gantline.io/v1alpha1", "InferenceService", "inferenceservices")
CHILD_KINDS = tuple(Resource(kind.api_version, kind.kind, kind.plural) for kind in resources.MANAGED_KINDS)
OPTIONAL_KINDS = frozenset(kind.kind for kind in resources.MANAGED_KINDS if kind.optional)


_CHECKPOINT = ("model", "plan", "artefacts")
"""Parts of the status that later steps build on."""


@dataclass
class Memory:
    """What one operator remembers of a service between reconciles. Losing it costs a few requests, nothing else."""

    uid: str
    seen: dict[Child, Version] = field(default_factory=dict)
    """Its children, as last seen."""
    pruned: tuple[int, str, str] = (0, "", "")
    """Generation and revision that were pruned last, and the good one that was left beside them."""
    planned: tuple[int, str] = (0, "")
    """Generation and inputs of the plan whose pods have their nodes."""
    replacements: Replacements = Replacements()
    """Of pods whose GPU failed."""
    handed_over: int = 0
    """Generation of which it is known that no other controller's autoscaler is left."""
    welcomed: bool = False
    """Whether it had its first child made before everything else."""

    def forget_checks(self) -> None:
        """The next reconcile looks at everything again."""
        self.pruned, self.planned = (0, "", ""), (0, "")
        self.handed_over = 0


@dataclass(frozen=True)
class Cluster:
    """What a reconcile needs of the rest of the operator."""

    client: Api
    settings: OperatorSettings
    rendering: resources.Settings
    facts: Callable[[str, Collection[str]], ClusterFacts]
    """(service `namespace/name`, uids of its own pods) -> the cluster, less what others have planned."""
    fleet: Callable[[], ClusterFacts]
    """The cluster, whoever holds its devices."""
    reserve: Callable[[str, InferenceServiceSpec, Plan | None], None]
    """Records what the service's pods will take; None: nothing."""
    count: Callable[[str, str], None]
    """(kind, verb) of each write."""
    memory: Callable[[str, str], Memory]
    """(service, uid) -> what is remembered of it."""
    scaling: Targets = field(default_factory=Targets)
    """What the autoscaling loop is told of services, and what it tells."""
    pooled: bool = False
    """Whether each service gets an InferencePool."""
    calibration: Callable[[], Calibration] = Calibration
    """What starts of models have measured."""
    report: Callable[[Start], PodReport | None] = lambda start: None
    """What a pod says of its start; None as long as it has not been asked, or does not answer."""
    device_failed: Callable[[str], None] = lambda node: None
    """Told of each pod that was replaced since a GPU of this node failed."""
    cache_seen: Callable[[tuple[str, str], Ledger, int | None], None] = lambda claim, ledger, limit_bytes: None
    """Told of what a claim (namespace, name) holds, for /metrics and for those that wait for another one's write."""
    cache_awaited: Callable[[str, str], None] = lambda service, claim: None
    """Told of a service that is to look again once its claim's note has changed."""
    evicted: Callable[[int, int], None] = lambda artefacts, freed_bytes: None
    """Told of each eviction."""
    time_plan: Callable[[], AbstractContextManager[Any]] = nullcontext
    now: Callable[[], datetime] = lambda: datetime.now(UTC)


@dataclass
class Pass:
    """One reconcile of one service."""

    cluster: Cluster
    parent: Object
    status: Object = field(default_factory=dict)
    """The status as it stands after the pass."""
    spec: InferenceServiceSpec = field(init=False)
    owner: resources.Parent = field(init=False)
    children: Children = field(init=False)
    pods: list[PodState] = field(default_factory=list)
    artefacts: dict[str, Object] = field(default_factory=dict)
    again_s: float | None = None
    handing_over: bool = False
    """Whether the autoscaler of another controller than the spec's is still there."""
    _found: dict[str, Any] = field(default_factory=dict)
    _wanted_jobs: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        metadata = self.parent["metadata"]
        self.namespace, self.name, self.uid = metadata["namespace"], metadata["name"], metadata["uid"]
        self.key = f"{self.namespace}/{self.name}"
        self.status = dict(self.parent.get("status") or {})
        self.recorded = dict(self.status)
        """The status as this pass found it: what is in it survived whatever happened before."""
        annotations = metadata.get("annotations") or {}
        self.restarted_at = str(annotations.get(resources.RESTARTED_AT, ""))[:256]
        self.paused = is_paused(annotations)
        owner = ApplyParent(self.namespace, self.name, self.uid, resources.child_selector(self.name))
        self.memory = self.cluster.memory(self.key, self.uid)
        self.children = Children(
            self.cluster.client, owner, CHILD_KINDS, self.memory.seen,
            optional=OPTIONAL_KINDS, paused=self.paused, count=self.cluster.count,
            confirm_parent=partial(_confirm_parent, self.cluster.client, self.namespace, self.name, self.uid),
        )  # fmt: skip
        self.artefacts = {item["kind"]: item for item in self.recorded.get("artefacts") or []}

    @property
    def server_pods(self) -> list[PodState]:
        return [pod for pod in self.pods if pod.role == "server"]

    def _read_policy(self) -> Policy | None:
        known = {**self.recorded, "plan": self._found.get("plan") or self.recorded.get("plan")}
        return policy_of(self.spec, known, self.cluster.settings)

    def _note_scaling(self) -> None:
        """Tells the autoscaling loop how the service is, as far as this pass went."""
        policy = self._read_policy()
        if policy is None:
            self.cluster.scaling.note(self.key, None)
            return
        rollout = read_rollout(self.children.live.get(("Deployment", self.name)))
        target = Target(
            namespace=self.namespace,
            name=self.name,
            uid=self.uid,
            revision=self._found.get("revision") or self.recorded.get("revision", ""),
            policy=policy,
            current=self.spec.replicas,
            generation=self.parent["metadata"].get("generation", 0),
            pods=tuple(pod for pod in self.server_pods if not pod.deleting),
            rolling=rollout is not None and (not rollout.seen or rollout.replicas > rollout.updated),
            paused=self.paused or self.spec.suspend or self.handing_over,
        )
        self.cluster.scaling.note(self.key, target)

    def _surroundings(self) -> list[Object]:
        """What has to be there before any pod, whatever its revision."""
        return resources.network_policies(self.owner, self.cluster.rendering)

    def _doors(self) -> list[Object]:
        """How clients reach what serves, whatever its revision."""
        pools = [resources.inference_pool(self.owner, self.cluster.rendering)] if self.cluster.pooled else []
        return [*resources.ingress(self.owner, self.cluster.rendering), *pools]

    async def _look(self) -> None:
        """What decisions need. A service without a status is new: what a killed operator may have made for it is found by name."""
        if not self.recorded:
            return
        selector = resources.child_selector(self.name)
        listing = self.cluster.client.list(PODS, self.namespace, labelSelector=selector)
        _, pods = await asyncio.gather(self.children.observe("Job", "ControllerRevision"), listing)
        self.pods = [read_pod(pod) for pod in pods]

    async def _checkpoint(self) -> None:
        """Writes down what later steps build on, if it is new: a restart in between must come to the same decision.

        Conditions stay as they are: half a pass cannot judge them, and events tell of what changes between one whole pass and the next.
        """
        built = self._build_status()
        if any(built.get(part) != self.status.get(part) for part in _CHECKPOINT):
            await self._write({name: built.get(name) if name in _CHECKPOINT else self.status.get(name) for name in {*built, *self.status}})

    async def _write_status(self) -> None:
        await self._write(self._build_status())

    async def _write(self, built: Object) -> None:
        built = {name: value for name, value in built.items() if value is not None}
        if built == self.status:
            return
        metadata = {"name": self.name, "namespace": self.namespace, "uid": self.uid}
        body = {"apiVersion": SERVICES.api_version, "kind": SERVICES.kind, "metadata": metadata, "status": built}
        self.cluster.count(SERVICES.kind, "apply")
        try:
            await self.cluster.client.apply(SERVICES, body, subresource="status")
        except ApiError as error:
            if UNDECLARED not in str(error):
                raise
            await self._write_what_is_known(built)
        self.status = built

    async def _write_what_is_known(self, built: Object) -> None:
        """Under a definition that is older than this operator: a status without one of its fields is better than none. Apply refuses a
        field that is not declared, a merge patch drops it."""
        gone = dict.fromkeys(self.status.keys() - built.keys())
        changes = {"metadata": {"uid": self.uid}, "status": {**built, **gone}}
        await self.cluster.client.patch(SERVICES, self.namespace, self.name, changes, subresource="status")

    def _build_status(self) -> Object:
        problems: list[Problem] = list(self.children.problems)
        deployment = self.children.live.get(("Deployment", self.name))
        kept = {"revision": self.recorded.get("revision", ""), "model": self.recorded.get("model")}
        values = {**kept, "rollout_record": self.recorded.get("rollout") or {}, **self._found}
        if "current" not in self._found:
            values.setdefault("record", Record.from_status(self.recorded.get("stages")))
        if "spec_trouble" in self._found:
            values.setdefault("plan", self.recorded.get("plan"))
        findings = Findings(
            namespace=self.namespace,
            name=self.name,
            generation=self.parent["metadata"].get("generation", 0),
            selector=",".join(f"{key}={value}" for key, value in resources.pod_selector(self.name, "server").items()),
            artefacts=[self.artefacts[kind] for kind in sorted(self.artefacts)],
            problems=problems,
            paused=self.paused,
            rollout=read_rollout(deployment),
            pods=self.pods,
            scaling_report=self.cluster.scaling.report(self.key),
            **values,
        )
        return build_status(findings, self.status, self.cluster.now())

    def _look_again(self, seconds: float) -> None:
        self.again_s = seconds if self.again_s is None else min(self.again_s, seconds)


async def _confirm_parent(client: Api, namespace: str, name: str, uid: str) -> None:
    """Raises ApiError where the service is not there any more as a pass found it: the next pass will know. No method: a pass that its
    children point back to would hold all that it has read until the garbage collector comes."""
    metadata = (await client.get(SERVICES, namespace, name))["metadata"]
    if metadata["uid"] != uid or "deletionTimestamp" in metadata:
        raise Conflict(f"InferenceService {namespace}/{name} is being deleted")


def policy_of(spec: InferenceServiceSpec, status: Object, settings: OperatorSettings) -> Policy | None:
    """How a service with this status is to be scaled; None where its spec does not say."""
    startup = re.fullmatch(r"([0-9]{1,6})s", str((status.get("startup") or {}).get("total", "")))
    startup_s = float(startup[1]) if startup else None
    interval_s = float(settings.scaling_interval_seconds)
    return build_policy(spec, max_batch=(status.get("plan") or {}).get("maxBatchSize"), startup_s=startup_s, interval_s=interval_s)


def is_paused(annotations: Mapping[str, str]) -> bool:
    """Whether gantline.io/paused says so. Whoever sets it wants it: any value pauses but the one that says no, and none."""
    return annotations.get(resources.PAUSED, "").strip().lower() not in ("", "false")


def sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
