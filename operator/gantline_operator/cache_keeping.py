"""The cache volume as one service sees it: what is there already, who makes what is not, what must go to make room.

    wanted -> going?   an eviction has it: wait until that is over, then make it again
           -> there?   noted as in use, then used, whoever made it
           -> made by another service: wait for that one, unless it is no more
           -> room?    else a Job removes what nothing uses, longest out of use first
           -> noted as in use and made by us, then the stage's Job

Everything that two services could decide at once is a write of the claim's note (`cache_ledger.py`), which one of them loses and looks
again. Nothing is evicted that the note, a running pod, or the status of a service that has not noted anything yet says is in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from gantline_runtime.termination import TerminationMessage

from gantline_operator import resources
from gantline_operator.apply import Problem, problem_of
from gantline_operator.cache_ledger import LEDGER, LIMIT, MAX_ENTRIES, Entry, Eviction, Ledger, parse, render, user_of
from gantline_operator.claim_sharing import sharing_of
from gantline_operator.client import ApiError, Conflict, NotFound, Object
from gantline_operator.conditions import Reason
from gantline_operator.eviction import Room, artefacts_of_pods, artefacts_of_template, plan_eviction, template_of
from gantline_operator.observe import PODS
from gantline_operator.plan import Plan
from gantline_operator.pod_state import Trouble, parse_time
from gantline_operator.quantities import parse_quantity
from gantline_operator.reconcile_pass import CHILD_KINDS, SERVICES
from gantline_operator.shapes import readable
from gantline_operator.stage_runner import StageRunner
from gantline_operator.stages import Create, Failed, Running, StageName, read_job
from gantline_operator.status import write_time

__all__ = ["CLAIMS", "CacheKeeping"]

CLAIMS = next(kind for kind in CHILD_KINDS if kind.kind == "PersistentVolumeClaim")
_JOBS = next(kind for kind in CHILD_KINDS if kind.kind == "Job")

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9]{1,16}-[0-9a-f]{10}")

_WAIT_POLL_S = 10.0
_FULL_POLL_S = 60.0
_GOING_POLL_S = 1.0
_ABANDONED = timedelta(minutes=15)
"""An eviction takes seconds; one that old has lost its service's interest."""

_MOMENT = timedelta(seconds=30)
"""From a claim's note to the Job, and from the Job's end to the note."""

Build = Callable[[int], Object]


class CacheKeeping(StageRunner):
    """The part of a reconcile that deals with the claim and its note."""

    _claim: Object | None = None
    _ledger: Ledger = Ledger()
    _uses: frozenset[str] = frozenset()
    """Names that this pass found it needs."""
    _living: Ledger = Ledger()
    """The ledger without services that are no more, as of the last look."""
    _serving_plan: Plan | None = None

    @property
    def _user(self) -> str:
        return user_of(self.name, self.uid)

    @property
    def _idle(self) -> bool:
        """Suspended, and no pod is left: then nothing is in use."""
        return self.spec.suspend and not self.server_pods

    async def _open_cache(self, claim: Object) -> bool:
        """False: the note cannot be written. Raises Conflict.

        A claim of the same name but another uid is another volume: what the status has of the earlier one is noted as gone, and a note that
        was restored or copied with the claim is worth nothing.
        """
        name, uid = claim["metadata"]["name"], claim["metadata"]["uid"]
        self._claim = claim
        self.owner = replace(self.owner, cache_sharing=sharing_of(claim, read_only=False))
        written = parse((claim["metadata"].get("annotations") or {}).get(LEDGER))
        self._ledger = written if written != Ledger() else Ledger(claim=uid)  # a claim that nothing was noted of need not be written to
        if written.claim not in ("", uid):
            _log.warning("%s: the note on claim %s is of another claim (%s), and counts for nothing", self.key, name, written.claim)
        if not await self._note(self._ledger.of_claim(uid)):
            return False
        self._ledger = self._ledger.of_claim(uid)  # also while the service is paused
        self._found["cache"] = {"claim": name, "claimUid": uid}
        items = [(kind, item) for kind, item in self.artefacts.items() if item.get("claim") == name]
        stale = {kind: f"{kind}-{item['hash']}" for kind, item in items if item.get("claimUid", uid) != uid}
        if not await self._note(self._ledger.lost(stale.values(), self._now())):
            return False
        lost = {kind: artefact for kind, artefact in stale.items() if not self._ledger.has(artefact)} if not self.paused else {}
        for kind in lost:
            del self.artefacts[kind]
        if lost:
            _log.warning("%s: claim %s was made anew; gone with the earlier one: %s", self.key, name, ", ".join(lost.values()))
        return True

    async def _note(self, ledger: Ledger) -> bool:
        """Write the claim's note, if it is another one. False: the API server will go on refusing. Raises Conflict."""
        if ledger == self._ledger or self.paused or self._claim is None:
            return True
        metadata = self._claim["metadata"]
        guard = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        body = {"metadata": {**guard, "annotations": {LEDGER: render(ledger)}}}
        self.cluster.count(CLAIMS.kind, "patch")
        try:
            self._claim = await self.cluster.client.patch(CLAIMS, self.namespace, metadata["name"], body)
        except ApiError as error:
            problem = None if isinstance(error, Conflict) else problem_of(error, f"PersistentVolumeClaim {metadata['name']}")
            if problem is None:
                raise
            self.children.problems.append(problem)
            return False
        self._ledger = ledger
        return True

    async def _find_artefact(self, kind: str, digest: str) -> Object | None:
        """What is known of an artefact that is there and will stay for as long as we use it; None where it has to be made (again)."""
        name, known = f"{kind}-{digest}", self.artefacts.get(kind, {})
        claim = self.owner.cache_claim
        ours = known.get("hash") == digest and known.get("claim", claim) == claim
        there = self._ledger.has(name)
        # Of a copy that a Job found on the volume only the Job that would make it can tell how good it is.
        unjudged = there is True and not ours and kind != "fetch" and not self._ledger.entries[name].perplexity
        if self._ledger.is_going(name) or there is False or (there is None and not ours) or unjudged:
            if ours:
                del self.artefacts[kind]
            return None
        self._uses |= {name}
        if not self._idle:
            noted = self._ledger.use(self._user, name, self._now(), bytes=known.get("bytes", 0) if ours else 0, made=True)
            if not await self._note(noted):
                return None
        self.artefacts[kind] = {**(known if ours else self._adopted(kind, digest)), **self._claim_mark()}
        return self.artefacts[kind]

    def _claim_mark(self) -> Object:
        """The opened claim, as records of artefacts name it."""
        assert self._claim is not None, "the claim was opened"
        return {"claim": self.owner.cache_claim, "claimUid": self._claim["metadata"]["uid"]}

    def _adopted(self, kind: str, digest: str) -> Object:
        """The record of an artefact that another service made."""
        entry = self._ledger.entries[f"{kind}-{digest}"]
        path = resources.cache_location(self.owner, kind, digest).path
        item: Object = {"kind": kind, "hash": digest, "path": path, "claim": self.owner.cache_claim, "bytes": entry.bytes}
        return {**item, "perplexity": dict(entry.perplexity)} if entry.perplexity else item

    async def _make_artefact(
        self, stage: StageName, kind: str, digest: str, needed_bytes: int, job_digest: str, build: Build
    ) -> TerminationMessage | None:
        """The answer of the Job that makes it; until there is one, `_found` says what it waits for."""
        name = f"{kind}-{digest}"
        self._uses |= {name}
        if self.spec.suspend or self.paused:
            if not self.paused and self._ledger.has(name) is False and await self._drop_stale(stage, job_digest):
                return None
            return await self._stage(stage, job_digest, build)
        entry = self._ledger.entries.get(name)
        if (entry is None or entry.maker != self._user) and await self._drop_stale(stage, job_digest):
            return None
        step = self._next_step(stage, job_digest)
        if isinstance(step, Create) and not await self._may_start(stage, name, needed_bytes):
            self._wanted_jobs.add(job_digest)
            return None
        if not isinstance(step, Failed):
            noted = self._ledger.use(self._user, name, self._now(), bytes=needed_bytes).make(self._user, name)
            if not await self._note(noted):
                return None
        answer = await self._stage(stage, job_digest, build)
        if answer is None:
            await self._look_at_failure(stage, name, needed_bytes)
        return answer

    async def _drop_stale(self, stage: StageName, job_digest: str) -> bool:
        """Whether there is a Job that made it before it was evicted, or its pod: its answer would be taken for that of the next one."""
        jobs = [job["metadata"]["name"] for job in self._jobs(stage, job_digest) if read_job(job).state == "Complete"]
        for job in jobs:
            await self.children.delete(("Job", job))
        pods = [pod for pod in self.pods if (pod.role, pod.revision, pod.phase) == (stage, job_digest, "Succeeded")]
        if not jobs and not pods:
            return False
        self._found["stage"] = (stage, Running("", 0))
        self._look_again(_GOING_POLL_S)
        return True

    async def _note_made(self, kind: str, item: Mapping[str, Any], answer: TerminationMessage) -> bool:
        name = f"{kind}-{item['hash']}"
        ledger = self._ledger.made(name, item.get("bytes", 0), item.get("perplexity") or {})
        # What was evicted since the Job looked is not there, whatever it says.
        whole, halves = ({key: size for key, size in part.items() if self._ledger.has(key) is None} for part in read_contents(answer))
        return await self._note(ledger.discover(whole, halves, self._now()) if whole or halves else ledger)

    async def _look_at_failure(self, stage: StageName, name: str, needed_bytes: int) -> None:
        """A failed Job leaves the making to whoever comes first; one for which the volume was too full has others make room."""
        step = self._found["stage"][1]
        if not isinstance(step, Failed) or not await self._note(self._ledger.stop_making(self._user, name)):
            return
        cleared = any(time >= write_time(step.finished) for time in self._ledger.gone.values())
        if step.trouble.reason is Reason.DISK_FULL and not cleared:
            room = await self._plan_room(name, needed_bytes, None)
            if room.evict or self._ledger.looked < write_time(step.finished):  # nobody may have noted what lies there
                await self._evict(room)
            else:
                self._found["stage"] = (stage, replace(step, trouble=self._full(step.trouble.message, room)))

    # ---- others ------------------------------------------------------------------------------------------------------------------------

    async def _may_start(self, stage: StageName, name: str, needed_bytes: int) -> bool:
        eviction = self._ledger.eviction
        if eviction is not None and self._ledger.is_going(name) and not await self._take_over(eviction):
            self._wait(stage, Reason.EVICTING, f"The cache volume is being cleared by {_service(eviction.by)}.")
            return False
        entry = self._ledger.entries.get(name)
        if entry is not None and entry.maker not in ("", self._user) and await self._is_at_work(entry, stage):
            doing = {"fetch": Reason.FETCHING, "quantize": Reason.QUANTIZING}[stage]
            self._wait(stage, doing, f"Service {_service(entry.maker)} makes the same in the same cache volume.")
            return False
        return await self._make_room(stage, name, needed_bytes)

    def _wait(self, stage: StageName, reason: Reason, message: str) -> None:
        self._found["stage"] = (stage, Running("", 0, Trouble(reason, message)))
        self.cluster.cache_awaited(self.key, self.owner.cache_claim)
        self._look_again(_WAIT_POLL_S)

    async def _is_at_work(self, entry: Entry, stage: StageName) -> bool:
        """Whether the maker lives and has a Job under way, or had one, or could not have one yet, a moment ago."""
        if not await self._lives(entry.maker):
            return False
        selector = f"{resources.child_selector(_service(entry.maker))},gantline.io/role={stage}"
        jobs = [read_job(job) for job in await self.cluster.client.list(_JOBS, self.namespace, labelSelector=selector)]
        moments = [parse_time(entry.used), *(job.finished for job in jobs)]
        lately = any(moment is not None and self.cluster.now() - moment < _MOMENT for moment in moments)
        return lately or any(job.state == "Active" for job in jobs)

    async def _lives(self, user: str) -> bool:
        """Whether a service goes on with what it began."""
        name, _, uid = user.rpartition(".")
        try:
            other = await self.cluster.client.get(SERVICES, self.namespace, name)
        except NotFound:
            return False
        metadata = other["metadata"]
        return metadata["uid"].startswith(uid) and "deletionTimestamp" not in metadata and not other["spec"].get("suspend")

    # ---- room --------------------------------------------------------------------------------------------------------------------------

    async def _make_room(self, stage: StageName, name: str, needed_bytes: int) -> bool:
        """Whether there is room, or as much as can be said of it: a volume whose size nobody states may hold more than is known."""
        limit, stated = self._limit()
        self._check_limit()
        if limit is None or not plan_eviction(self._ledger, name, needed_bytes, limit, ()).needed:
            return True
        room = await self._plan_room(name, needed_bytes, limit)
        if room.evict:
            return await self._evict(room)
        if not (room.missing_bytes and stated):
            return True
        cause = f"The cache volume may hold {readable(limit)} (annotation {LIMIT}), and {readable(room.missing_bytes)} more are needed."
        self._found["stage"] = (stage, Running("", 0, self._full(cause, room)))
        self.cluster.cache_awaited(self.key, self.owner.cache_claim)
        self._look_again(_FULL_POLL_S)
        return False

    def _limit(self) -> tuple[int | None, bool]:
        """Bytes that the claim's artefacts may take, and whether somebody said so or it is only the claim's capacity."""
        assert self._claim is not None, "the claim was opened"
        stated = (self._claim["metadata"].get("annotations") or {}).get(LIMIT)
        capacity = ((self._claim.get("status") or {}).get("capacity") or {}).get("storage")
        with contextlib.suppress(ValueError):
            if stated is not None:
                return int(parse_quantity(stated)), True
        return (int(parse_quantity(capacity)), False) if capacity else (None, False)

    def _check_limit(self) -> None:
        """An annotation that cannot be read is no limit; that is said where the limit would count."""
        assert self._claim is not None, "the claim was opened"
        stated = (self._claim["metadata"].get("annotations") or {}).get(LIMIT)
        if stated is not None and not self._limit()[1]:
            claim = self._claim["metadata"]["name"]
            message = f"Annotation {LIMIT} of PersistentVolumeClaim {claim} is no quantity such as 500Gi. Correct it, or take it away."
            self.children.problems.append(Problem(Reason.INVALID_CONFIGURATION, message))

    async def _plan_room(self, name: str, needed_bytes: int, limit_bytes: int | None) -> Room:
        """With a look at who is there: the note itself may name services that are no more."""
        services, pods = await asyncio.gather(
            self.cluster.client.list(SERVICES, self.namespace),
            self.cluster.client.list(PODS, self.namespace, labelSelector=resources.cache_selector(self.owner.cache_claim)),
        )
        there = {user_of(item["metadata"]["name"], item["metadata"]["uid"]): item for item in services}
        self._living = self._ledger.without(self._ledger.users() - set(there), self._now())
        known = self._living.users()
        silent = [item for user, item in there.items() if user not in known and not item["spec"].get("suspend")]
        recorded = [artefact for item in silent for artefact in (item.get("status") or {}).get("artefacts") or []]
        kept = {f"{item['kind']}-{item['hash']}" for item in recorded if item.get("claim") == self.owner.cache_claim}
        return plan_eviction(self._living, name, needed_bytes, limit_bytes, kept | artefacts_of_pods(pods) | self._uses)

    async def _evict(self, room: Room) -> bool:
        """Begins; the Job comes once the note says what goes. False while it is under way."""
        if self._ledger.eviction is not None:
            await self._take_over(self._ledger.eviction)
            self._wait("evict", Reason.EVICTING, "Another eviction is under way.")
            return False
        ledger = self._living.begin_eviction(room.evict, self._user, self._now())
        return await self._note(ledger) and await self._finish_eviction()

    async def _take_over(self, eviction: Eviction) -> bool:
        """Whether an eviction that nobody goes on with is over now."""
        began = parse_time(eviction.since)
        old = began is None or self.cluster.now() - began > _ABANDONED
        if eviction.by != self._user and (old or not await self._lives(eviction.by)):
            if not await self._note(self._ledger.begin_eviction(eviction.names, self._user, self._now())):
                return False
            return await self._finish_eviction()
        return False

    async def _finish_eviction(self) -> bool:
        """Whether none of ours is under way (any more)."""
        eviction = self._ledger.eviction
        if eviction is None or eviction.by != self._user or self.paused:
            return True
        names = eviction.names

        def build(attempt: int) -> Object:
            placement = self._plan_stage("evict", None, self._serving_plan)
            return resources.evict_job(
                self.owner, placement, self.cluster.rendering, names=names, since=eviction.since, attempt=attempt
            )  # fmt: skip

        answer = await self._stage("evict", resources.evict_hash(self.owner.cache_claim, names, eviction.since), build)
        if answer is None:
            if self._found.get("record") is not None:
                self._found["record"] = replace(self._found["record"], message=self._tell(names))
            return False
        gone = read_eviction(answer, names)
        freed = sum(self._ledger.entries[name].bytes for name in gone if name in self._ledger.entries)
        ledger = self._ledger.end_eviction(gone, self._now()).discover(*read_contents(answer), self._now())
        strays = sorted(ledger.entries.keys() - self._ledger.entries.keys())
        if not await self._note(ledger):
            return False
        self.cluster.evicted(len(gone), freed)
        _log.info("%s: evicted %s (%s) from claim %s", self.key, ", ".join(gone) or "nothing", readable(freed), self.owner.cache_claim)
        if strays:
            _log.info("%s: found in claim %s, noted by nobody: %s", self.key, self.owner.cache_claim, ", ".join(strays))
        return True

    def _tell(self, names: tuple[str, ...]) -> str:
        if not names:
            return "looking at what the volume holds"
        entries = [(name, self._ledger.entries.get(name)) for name in names]
        told = [f"{name} ({readable(entry.bytes)}, unused since {entry.used})" for name, entry in entries if entry is not None]
        return ", ".join(told)

    def _full(self, cause: str, room: Room) -> Trouble:
        message = f"{cause.rstrip('.')}. Nothing is left to evict: {readable(room.in_use_bytes)} of models in it are in use."
        if self.spec.cache.claim_name is None:
            cure = "Raise spec.cache.size (the claim grows only where its StorageClass allows it), or use a larger claim of your own."
        else:
            cure = f"Enlarge claim {self.spec.cache.claim_name} or its annotation {LIMIT}, or suspend or delete services that share it."
        return Trouble(Reason.DISK_FULL, message, cure)

    # ---- the end of a pass -------------------------------------------------------------------------------------------------------------

    async def _hold_served(self, revision: Object | None) -> bool:
        """Whether what a revision's pods serve is there, and stays while they run; what nothing is known of is taken to be there."""
        names = artefacts_of_template(template_of(revision), self.owner.cache_claim)
        if not names or (self._claim is None and not await self._look_at_claim()):
            return True
        if any(self._ledger.is_going(name) or self._ledger.has(name) is False for name in names):
            return False
        ledger = self._ledger
        for name in names if not self._idle else ():
            ledger = ledger.use(self._user, name, self._now(), bytes=0, made=True)
        return await self._note(ledger)

    async def _let_go(self) -> None:
        """What neither this pass nor a revision that serves needs is free to be evicted."""
        if self._claim is None:
            used = any(item.get("claim") == self.owner.cache_claim for item in self.artefacts.values())
            if not used or not await self._look_at_claim():
                return
        record = {**(self.recorded.get("rollout") or {}), **self._found.get("rollout_record", {})}
        marks = {self._found.get("revision", ""), self.recorded.get("revision", ""), record.get("good", "")}
        revisions = [self.children.live.get(("ControllerRevision", f"{self.name}-{mark}")) for mark in marks if mark]
        served = {name for item in revisions for name in artefacts_of_template(template_of(item), self.owner.cache_claim)}
        uses = set() if self._idle else self._uses | served
        await self._note(self._ledger.keep_only(self._user, uses, self._now()))
        self.cluster.cache_seen((self.namespace, self.owner.cache_claim), self._ledger, self._limit()[0])

    async def _look_at_claim(self) -> bool:
        try:
            claim = await self.cluster.client.get(CLAIMS, self.namespace, self.owner.cache_claim)
        except NotFound:
            return False
        return await self._open_cache(claim)

    def _now(self) -> str:
        return write_time(self.cluster.now())


def read_eviction(answer: TerminationMessage, names: tuple[str, ...]) -> list[str]:
    """Names that are gone, from a Job's answer: nothing else is believed than what was asked."""
    said = answer.artefact.get("evicted")
    return [name for name in names if isinstance(said, list) and name in said]


def read_contents(answer: TerminationMessage) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes of the whole artefacts that a Job found on the volume, of the half made ones), by name. What is odd is left out."""
    return _read_sizes(answer.artefact.get("found")), _read_sizes(answer.artefact.get("halves"))


def _read_sizes(found: object) -> dict[str, int]:
    sizes = list(found.items())[:MAX_ENTRIES] if isinstance(found, dict) else ()
    return {name: size for name, size in sizes if type(size) is int and 0 <= size < 1 << 60 and _NAME.fullmatch(name)}


def _service(user: str) -> str:
    return user.rpartition(".")[0]
