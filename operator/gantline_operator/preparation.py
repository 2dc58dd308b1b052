"""From a source to files that can be served: inspect, plan, fetch, quantize. What is in the status is done and never done again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gantline_runtime.errors import CheckpointError
from gantline_runtime.model_facts import ModelFacts
from gantline_runtime.termination import TerminationMessage

from gantline_operator import resources
from gantline_operator.accelerators import USUAL_TAINTS
from gantline_operator.cache_keeping import CLAIMS, CacheKeeping
from gantline_operator.claim_sharing import Sharing, sharing_of
from gantline_operator.client import NotFound, Object
from gantline_operator.conditions import Reason
from gantline_operator.image_volumes import refusal_of_nodes, refusal_of_server, refusal_of_source
from gantline_operator.plan import Plan, Rejected, StagePlan, cache_size, plan, plan_inputs, stands
from gantline_operator.plan_status import from_status, rejected_status, to_status
from gantline_operator.pod_state import Trouble
from gantline_operator.reconcile_pass import sentence
from gantline_operator.resources import ModelLocation
from gantline_operator.stage_plan import disk_bytes
from gantline_operator.stages import Record, Running, StageName, read_job

__all__ = ["Preparation", "judge", "summarize"]

_MISSING_POLL_S = 30.0
_UNAVAILABLE_POLL_S = 300.0

_log = logging.getLogger(__name__)


class Preparation(CacheKeeping):
    """The part of a reconcile that gets a model ready."""

    async def _inspect(self) -> ModelFacts | None:
        digest = resources.inspect_hash(self.owner)
        known = self.recorded.get("model") or {}
        inspected = known.get("inputs") == digest
        if not await self._open_source(inspected):
            return None
        if not inspected:

            def build(attempt: int) -> Object:
                return resources.inspect_job(self.owner, self._place_inspection(), self.cluster.rendering, attempt=attempt)

            answer = await self._stage("inspect", digest, build)
            if answer is None:
                return None
            known = {"inputs": digest, **answer.facts}
        try:
            model = ModelFacts.from_json({key: value for key, value in known.items() if key != "inputs"})
        except CheckpointError as error:
            self._refuse_stage("inspect", digest, Trouble(Reason.INTERNAL_ERROR, sentence(str(error)), error.cure))
            return None
        self._found["model"] = known
        return model

    async def _open_source(self, inspected: bool) -> bool:
        """Whether the claim that a pvc:// source names is there, and who may mount it: without it pods would hang, and say so only to the
        scheduler."""
        location = resources.source_location(self.spec.model.uri)
        for mount in location.mounts if location else ():
            claim = await self._find_claim(mount.claim)
            if claim is None:
                cure = "Create it, or correct spec.model.uri."
                trouble = Trouble(Reason.MODEL_NOT_FOUND, f"PersistentVolumeClaim {mount.claim} does not exist.", cure)
                self._found["stage"] = ("inspect", Running("", 0, trouble))
                self._look_again(_MISSING_POLL_S)
                return False
            if inspected and "deletionTimestamp" in claim["metadata"]:
                await self._let_claim_go(claim)
            self.owner = replace(self.owner, source_sharing=sharing_of(claim, read_only=True))
        return True

    def _place_inspection(self) -> StagePlan:
        """Where only one node can mount the source, it goes to whatever has it already, be that on nodes that are for pods with devices."""
        placement = self._plan_stage("inspect")
        if self.owner.source_sharing is Sharing.ANY:
            return placement
        previous = self._previous_plan()
        usual = (*placement.tolerated, *(previous.placement.tolerated if previous else ()), *USUAL_TAINTS)
        return replace(placement, tolerated=tuple(dict.fromkeys(usual)))

    async def _find_claim(self, name: str) -> Object | None:
        try:
            return await self.cluster.client.get(CLAIMS, self.namespace, name)
        except NotFound:
            return None

    def _plan(self, model: ModelFacts) -> Plan | None:
        """No await between looking at what others reserved and reserving: two services never count on the same device.

        A plan whose pods have their nodes stands until the spec changes or the resync asks again whether it still fits.
        """
        previous = self._previous_plan()
        placed = sum(1 for pod in self.server_pods if pod.node and not pod.deleting)
        started = any(pod.node for pod in self.server_pods)
        generation = self.parent["metadata"].get("generation", 0)
        inputs = plan_inputs(self.spec, model)
        decision: Plan | Rejected
        if previous is not None and started and previous.inputs == inputs and self.memory.planned == (generation, inputs):
            decision = previous
        else:
            with self.cluster.time_plan():
                decision = self._decide(model, previous, started=started, placed=0 < self.spec.replicas <= placed)
        if isinstance(decision, Rejected):
            self._found["plan"] = rejected_status(decision)
            self._found["plan_trouble"] = Trouble(decision.reason, sentence(decision.message), decision.cure)
            return None
        # As the status will give it back, so that the next pass renders the same.
        decision = from_status(to_status(decision), self.spec) or decision
        self.memory.planned = (generation, decision.inputs) if started else (0, "")
        self.cluster.reserve(self.key, self.spec, decision)
        self._found |= {"plan": to_status(decision), "plan_summary": summarize(decision), "quantize": decision.quantize}
        return decision

    def _decide(self, model: ModelFacts, previous: Plan | None, *, started: bool, placed: bool) -> Plan | Rejected:
        """`placed`: all pods have their nodes."""
        images, learnt = self.cluster.rendering.images, self.cluster.calibration()
        if previous is not None and placed:
            kept = stands(previous, self.spec, model, self.cluster.fleet(), images)
            if kept is not None:
                return kept
        facts = self.cluster.facts(self.key, [pod.uid for pod in self.pods])
        return plan(self.spec, model, facts, images, previous, started=started, calibration=learnt)

    def _previous_plan(self) -> Plan | None:
        """What stands in the status; after a rejection, what still serves."""
        stored = from_status(self.recorded.get("plan") or {}, self.spec)
        if stored is not None:
            return stored
        revision = self._revision(self.recorded.get("revision", ""))
        return from_status(revision["data"].get("plan") or {}, self.spec) if revision else None

    async def _prepare(self, model: ModelFacts, planned: Plan) -> ModelLocation | None:
        """Where the files to be served lie, once they are there."""
        await self._checkpoint()
        location = resources.source_location(self.spec.model.uri, self.owner.source_sharing)
        if self.spec.model.delivery == "files":
            self.artefacts.pop("image", None)
        else:
            location = await self._mount_image(model, planned)
            if location is None and self.spec.model.delivery == "image":
                return None
        if location is not None and not planned.quantize:
            return location
        if not await self._cache_ready(model, planned):
            return None
        if planned.quantize and await self._find_artefact(self.spec.quantization.method, self._copy_digest(model)) is not None:
            return self._judged_copy(model)  # what it was made of is needed no more
        if location is None:
            location = await self._fetch(model, planned)
        if location is None or not planned.quantize:
            return location
        return await self._quantize(model, planned, location)

    async def _mount_image(self, model: ModelFacts, planned: Plan) -> ModelLocation | None:
        """The source as an image volume, where it shall and can be one. What was decided stands: pods are not replaced as nodes come."""
        delivery, digest = self.spec.model.delivery, resources.fetch_hash(self.spec, model.revision or None)
        location = resources.image_location(self.spec, model.revision, model.image_folder or "", model.weight_bytes)
        if self.artefacts.get("image", {}).get("hash") == digest:
            return location
        record = Record.from_status(self.recorded.get("stages"))
        begun = record is not None and (record.name, record.hash) == ("fetch", digest)
        if delivery == "auto" and (begun or self.artefacts.get("fetch", {}).get("hash") == digest):
            return None
        refusal = refusal_of_source(model) or (self._unlikely(planned) if delivery == "auto" else "")
        user = self.cluster.rendering.pod_user
        refusal = refusal or await refusal_of_server(self.cluster.client, self.namespace, location.images[0], user)
        if not refusal:
            self.artefacts["image"] = {"kind": "image", "hash": digest, "path": location.path}
            await self._checkpoint()
            return location
        if delivery == "auto":
            self.artefacts.pop("image", None)
            _log.info("%s: the model is fetched as files: %s", self.key, refusal)
        else:
            cure = "Push the model as an image to a cluster that mounts them, or set spec.model.delivery to files."
            self._found["stage"] = ("fetch", Running("", 0, Trouble(Reason.IMAGE_VOLUME_UNAVAILABLE, refusal, cure)))
            self._look_again(_UNAVAILABLE_POLL_S)
        return None

    def _unlikely(self, planned: Plan) -> str:
        """Why nodes may not be able to mount it; empty where nothing speaks against it."""
        registry = self.spec.model.uri.removeprefix("oci://").partition("/")[0]
        if {registry, registry.partition(":")[0]} & set(self.cluster.rendering.insecure_registries):
            return f"Registry {registry} speaks plain HTTP, which nodes do not unless they are told to."
        return refusal_of_nodes(self.spec, planned, self.cluster.facts(self.key, ()))

    async def _cache_ready(self, model: ModelFacts, planned: Plan) -> bool:
        """Whether the claim is there, and no eviction of ours is under way in it."""
        self._serving_plan = planned
        stage: StageName = "quantize" if resources.source_location(self.spec.model.uri) else "fetch"
        claim = self.spec.cache.claim_name
        if claim is None:
            size = cache_size(self.spec, model, planned.quantize, mounted="image" in self.artefacts)
            found = await self.children.ensure(resources.cache_claim(self.owner, self.cluster.rendering, size))
            if found is None:
                self._found["stage"] = (stage, None)
                return False
            if "deletionTimestamp" in found["metadata"]:
                await self._let_claim_go(found)
        else:
            found = await self._find_claim(claim)
        if found is not None:
            return await self._open_cache(found) and await self._finish_eviction()
        cure = "Create it, or leave spec.cache.claimName out to have one made."
        trouble = Trouble(Reason.CACHE_MISSING, f"PersistentVolumeClaim {claim} does not exist.", cure)
        self._found["stage"] = (stage, Running("", 0, trouble))
        self._look_again(_MISSING_POLL_S)
        return False

    async def _let_claim_go(self, claim: Object) -> None:
        """Somebody deletes it. Pods that serve keep it until they go; ended ones of ours must not, since no pod can use it any more."""
        for job in self._jobs_of_claim(claim["metadata"]["name"]):
            if read_job(job).state != "Active":
                await self.children.delete(("Job", job["metadata"]["name"]))

    async def _fetch(self, model: ModelFacts, planned: Plan) -> ModelLocation | None:
        revision = model.revision or None
        digest = resources.fetch_hash(self.spec, revision)
        location = resources.cache_location(self.owner, "fetch", digest)
        if await self._find_artefact("fetch", digest) is not None:
            return location

        def build(attempt: int) -> Object:
            placement = self._plan_stage("fetch", model, planned)
            return resources.fetch_job(self.owner, placement, self.cluster.rendering, revision=revision, attempt=attempt)

        needed = disk_bytes("fetch", model, self.spec)
        answer = await self._make_artefact("fetch", "fetch", digest, needed, digest, build)
        return location if answer is not None and await self._record_artefact("fetch", digest, answer) else None

    async def _quantize(self, model: ModelFacts, planned: Plan, source: ModelLocation) -> ModelLocation | None:
        method, digest = self.spec.quantization.method, self._copy_digest(model)

        def build(attempt: int) -> Object:
            placement = self._plan_stage("quantize", model, planned)
            return resources.quantize_job(
                self.owner, placement, self.cluster.rendering, source=source, fingerprint=model.fingerprint, attempt=attempt
            )

        needed = disk_bytes("quantize", model, self.spec)
        job_digest = resources.quantize_job_hash(self.spec, model.fingerprint)
        answer = await self._make_artefact("quantize", method, digest, needed, job_digest, build)
        if answer is None or not await self._record_artefact(method, digest, answer):
            return None
        return self._judged_copy(model)

    def _copy_digest(self, model: ModelFacts) -> str:
        return resources.quantize_hash(self.spec, model.fingerprint)

    def _judged_copy(self, model: ModelFacts) -> ModelLocation | None:
        """Where the copy lies, if it is good enough."""
        method = self.spec.quantization.method
        trouble, self._found["quality_summary"] = judge(self.artefacts[method], self.spec.quantization.max_perplexity_increase)
        if trouble is not None:
            self._found["quality_trouble"] = trouble
            return None
        return resources.cache_location(self.owner, method, self._copy_digest(model))

    async def _record_artefact(self, kind: str, digest: str, answer: TerminationMessage) -> bool:
        """In the claim's note, then in the status. False: the note cannot be written."""
        facts = answer.artefact.get("facts")
        perplexity = answer.artefact.get("perplexity")
        location = resources.cache_location(self.owner, kind, digest)
        item: Object = {"kind": kind, "hash": digest, "path": location.path, **self._claim_mark()}
        size = answer.artefact.get("weight_bytes", answer.artefact.get("bytes"))
        if isinstance(size, int):
            item["bytes"] = size
        if isinstance(perplexity, dict):
            item["perplexity"] = {key: f"{perplexity[key]:.6g}" for key in ("before", "after") if _is_number(perplexity.get(key))}
        if isinstance(facts, dict):
            item["facts"] = facts
        if not await self._note_made(kind, item, answer):
            return False
        self.artefacts[kind] = item
        await self._checkpoint()
        return True

    def _revision(self, mark: str) -> Object | None:
        return self.children.live.get(("ControllerRevision", f"{self.name}-{mark}")) if mark else None


def judge(artefact: Mapping[str, Any], limit: float | None) -> tuple[Trouble | None, str]:
    """Whether a quantized copy is good enough, and a sentence about it. Checked again here: the limit may be newer than the copy."""
    perplexity = artefact.get("perplexity") or {}
    before, after = _number(perplexity.get("before")), _number(perplexity.get("after"))
    if before is None or after is None:
        if limit is None:
            return None, "Quantized."
        cure = "Quantize again, or take spec.quantization.maxPerplexityIncrease away."
        return Trouble(Reason.QUALITY_GATE_FAILED, "The quantized copy came without a measured perplexity.", cure), ""
    text = f"Perplexity {before:.3f} before, {after:.3f} after."
    # Written so that a NaN fails.
    if limit is not None and not after <= before * (1 + limit):
        cure = "Raise spec.quantization.maxPerplexityIncrease, use a smaller groupSize, or serve the original."
        return Trouble(Reason.QUALITY_GATE_FAILED, f"The quantized copy is worse than the {limit:.1%} allowed. {text}", cure), text
    return None, text


def summarize(planned: Plan) -> str:
    """One sentence for PlanResolved."""
    status = to_status(planned)
    where = f"{status.get('count')} x {status.get('product') or status.get('resource')}" if status.get("resource") else "a CPU"
    return f"{status.get('precision')} on {where}, backend {status.get('backend')}, sessions of {status.get('sessionLen')} tokens."


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None
