"""What simulated pods do: kwok Stage objects, made here because they all share one template.

A pod's fate is its annotation `simulated.gantline.io/fate`; without one, a Job's pod completes and any other becomes Ready. Changing the
annotation of a living pod changes its fate. `simulated.gantline.io/after` ("5s") delays what the fate brings, `.../termination-message`
and `.../exit-code` say how the container ended.

    fate                 what becomes of the pod
    ready                Running and Ready
    never-ready          Running, never Ready
    complete             Running, then Succeeded (exit code 0)
    failed, crash-loop   restartPolicy Never: Failed; otherwise waiting in CrashLoopBackOff, with the last termination beside it
    oom                  the same, reason OOMKilled, exit code 137
    evicted              Failed with reason Evicted and no container status, as an eviction leaves it
    image-pull           Pending, ImagePullBackOff
    pending              bound to its node, nothing happens
"""

from __future__ import annotations

from typing import Any

__all__ = ["AFTER", "EXIT_CODE", "FATE", "FATES", "MESSAGE", "kwok_config"]

FATE = "simulated.gantline.io/fate"
AFTER = "simulated.gantline.io/after"
MESSAGE = "simulated.gantline.io/termination-message"
EXIT_CODE = "simulated.gantline.io/exit-code"
FATES = ("ready", "never-ready", "complete", "failed", "crash-loop", "oom", "evicted", "image-pull", "pending")
JOB_SECONDS = 0.2  # how long a Job's container runs unless `after` says otherwise: long enough to be seen Running
RESTARTS_SHOWN = 3
HEARTBEAT_S = 600  # the Lease carries the heartbeat; the Node's own status is as rare as a real kubelet's

_FATE = (
    f'.metadata.annotations["{FATE}"] // '
    '(if [(.metadata.ownerReferences // [])[] | select(.kind == "Job")] | length > 0 then "complete" else "ready" end)'
)
_READY = '.status.conditions.[] | select(.type == "Ready") | .status'
_WAITING = ".status.containerStatuses.[].state.waiting.reason"
Stage = dict[str, Any]


def kwok_config() -> list[Stage]:
    """Every Stage, as documents of kwok's configuration file."""
    return [
        node_heartbeat(),
        pod_ready(),
        pod_running(),
        pod_complete(),
        *pods_that_crash(),
        pod_evicted(),
        pod_image_pull(),
        *pods_deleted(),
    ]


def pod_ready() -> Stage:
    status = pod_status("Running", container("running", ready=True), ready=True)
    return stage("pod-ready", alive("Pending", "Running"), fate("ready"), key(_READY, "NotIn", "True"), status=status, after=0)


def pod_running() -> Stage:
    """The step before an end, and for `never-ready` the last one."""
    fates = fate("complete", "failed", "crash-loop", "oom", "never-ready")
    return stage("pod-running", alive("Pending"), fates, status=pod_status("Running", container("running"), ready=False))


def pod_complete() -> Stage:
    ended = container("terminated", reason="Completed", exit_code="0")
    return stage("pod-complete", alive("Running"), fate("complete"), status=pod_status("Succeeded", ended, ready=False), after=JOB_SECONDS)


def pods_that_crash() -> list[Stage]:
    by_annotation = f'{{{{ dig "metadata" "annotations" "{EXIT_CODE}" "1" . }}}}'
    made = []
    for name, fates, reason, code in (
        ("crash", ("failed", "crash-loop"), "Error", by_annotation),
        ("oom", ("oom",), "OOMKilled", "137"),
    ):
        final = key(".spec.restartPolicy", "In", "Never")
        ended = pod_status("Failed", container("terminated", reason=reason, exit_code=code), ready=False)
        made.append(stage(f"pod-{name}-once", alive("Running"), fate(*fates), final, status=ended, after=JOB_SECONDS))
        again, not_yet = key(".spec.restartPolicy", "NotIn", "Never"), key(_WAITING, "NotIn", "CrashLoopBackOff")
        looping = pod_status("Running", container("crash-loop", reason=reason, exit_code=code), ready=False)
        made.append(stage(f"pod-{name}-loop", alive("Running"), fate(*fates), again, not_yet, status=looping, after=JOB_SECONDS))
    return made


def pod_evicted() -> Stage:
    status = "phase: Failed\nreason: Evicted\nmessage: 'The node was low on resource: memory.'\ncontainerStatuses: null\n"
    return stage("pod-evicted", alive("Pending", "Running"), fate("evicted"), status=status, after=0)


def pod_image_pull() -> Stage:
    status = pod_status("Pending", container("waiting", reason="ImagePullBackOff"), ready=False)
    return stage("pod-image-pull", alive("Pending"), fate("image-pull"), key(_WAITING, "NotIn", "ImagePullBackOff"), status=status)


def pods_deleted() -> list[Stage]:
    """A pod that others still hold by a finalizer first ends, as a kubelet would make it: the Job controller waits for just that."""
    deleted, held = key(".metadata.deletionTimestamp", "Exists"), ".metadata.finalizers"
    ended = pod_status("Failed", container("terminated", reason="Error", exit_code="143"), ready=False)
    ending = stage("pod-end", deleted, key(held, "Exists"), key(".status.phase", "In", "Pending", "Running"), status=ended)
    removing = stage("pod-delete", deleted, key(held, "DoesNotExist"), status="")
    removing["spec"]["next"] = {"delete": True}
    return [ending, removing]


def node_heartbeat() -> Stage:
    conditions = (
        "{{ $now := Now }}\nconditions:\n{{ range NodeConditions }}\n- {lastHeartbeatTime: {{ $now | Quote }}, message: simulated, "
        "reason: {{ .reason | Quote }}, status: {{ .status | Quote }}, type: {{ .type | Quote }}}\n{{ end }}\n"
    )
    made = stage("node-heartbeat", key(_READY, "In", "True"), status=conditions)
    made["spec"]["resourceRef"]["kind"] = "Node"
    made["spec"]["delay"] = {"durationMilliseconds": HEARTBEAT_S * 1000, "jitterDurationMilliseconds": (HEARTBEAT_S + 60) * 1000}
    return made


def key(expression: str, operator: str, *values: str) -> list[dict[str, Any]]:
    return [{"key": expression, "operator": operator, **({"values": list(values)} if values else {})}]


def alive(*phases: str) -> list[dict[str, Any]]:
    return key(".metadata.deletionTimestamp", "DoesNotExist") + key(".status.phase", "In", *phases)


def fate(*fates: str) -> list[dict[str, Any]]:
    unknown = set(fates) - set(FATES)
    assert not unknown, f"fates without a line in the table: {unknown}"
    return key(_FATE, "In", *fates)


def stage(name: str, *selectors: list[dict[str, Any]], status: str, after: float | None = None) -> Stage:
    """A Stage for pods that fulfil all `selectors`; `after` (seconds) is the delay that the pod's own annotation replaces."""
    spec: dict[str, Any] = {
        "resourceRef": {"apiGroup": "v1", "kind": "Pod"},
        "selector": {"matchExpressions": [expression for selector in selectors for expression in selector]},
        "next": {"statusTemplate": status},
    }
    if after is not None:
        spec["delay"] = {
            "durationMilliseconds": round(after * 1000),
            "durationFrom": {"expressionFrom": f'.metadata.annotations["{AFTER}"]'},
        }
    return {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": name}, "spec": spec}


def container(state: str, *, ready: bool = False, reason: str = "", exit_code: str = "") -> str:
    """The status of one container, as the inner part of the template; `.` is the container, `$pod` the pod, `$now` the time."""
    message = f'{{{{ dig "metadata" "annotations" "{MESSAGE}" "" $pod | Quote }}}}'
    code = exit_code.replace(" . }}", " $pod }}")
    times = "startedAt: {{ $start | Quote }}, finishedAt: {{ $now | Quote }}"
    terminated = f"{{exitCode: {code}, reason: {reason}, message: {message}, {times}}}"
    states = {
        "running": "state: {running: {startedAt: {{ $now | Quote }}}}",
        "waiting": f"state: {{waiting: {{reason: {reason}, message: simulated}}}}",
        "terminated": f"state: {{terminated: {terminated}}}",
        "crash-loop": f"state: {{waiting: {{reason: CrashLoopBackOff, message: simulated}}}}\n  lastState: {{terminated: {terminated}}}",
    }
    restarts = RESTARTS_SHOWN if state == "crash-loop" else 0
    started = str(state == "running").lower()
    return f"ready: {str(ready).lower()}\n  started: {started}\n  restartCount: {restarts}\n  {states[state]}"


def pod_status(phase: str, container_status: str, *, ready: bool) -> str:
    """A pod's status as a template of kwok's; merged into the status that is there, so PodScheduled and start times stay."""
    truth = {True: '"True"', False: '"False"'}
    conditions = "".join(
        f"- {{type: {kind}, status: {truth[value]}, lastTransitionTime: {{{{ $now | Quote }}}}}}\n"
        for kind, value in (("Initialized", True), ("ContainersReady", ready), ("Ready", ready))
    )
    return f"""{{{{ $pod := . }}}}{{{{ $now := Now }}}}{{{{ $start := dig "status" "startTime" $now . }}}}
phase: {phase}
startTime: {{{{ $start | Quote }}}}
conditions:
{conditions}{{{{ with .spec.containers }}}}containerStatuses:
{{{{ range . }}}}
- name: {{{{ .name | Quote }}}}
  image: {{{{ .image | Quote }}}}
  imageID: {{{{ .image | Quote }}}}
  {container_status}
{{{{ end }}}}{{{{ end }}}}
{{{{ with .spec.initContainers }}}}initContainerStatuses:
{{{{ range . }}}}
- name: {{{{ .name | Quote }}}}
  image: {{{{ .image | Quote }}}}
  imageID: {{{{ .image | Quote }}}}
  ready: true
  restartCount: 0
  state: {{terminated: {{exitCode: 0, reason: Completed, startedAt: {{{{ $now | Quote }}}}, finishedAt: {{{{ $now | Quote }}}}}}}}
{{{{ end }}}}{{{{ end }}}}
{{{{ if not (dig "status" "podIP" "" .) }}}}
{{{{ $addresses := PodIPsWith .spec.nodeName (or .spec.hostNetwork false) (or .metadata.uid "") .metadata.name .metadata.namespace }}}}
{{{{ with $addresses }}}}podIP: {{{{ index . 0 | Quote }}}}
podIPs:
{{{{ range . }}}}- ip: {{{{ . | Quote }}}}
{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"""
