"""The board `fleet`: all services beside each other, the gateway, the operator, for whoever looks after the installation."""

from __future__ import annotations

from scripts.dashboards.colors import BAD_ABOVE_ZERO, BY_OUTCOME, BY_REASON, BY_RESULT, BY_STATUS, GOOD_AT_ZERO
from scripts.dashboards.panels import Sections, count, lines, now, stacked, table
from scripts.dashboards.queries import narrowed, of_all, per_minute, quantiles, rate, tokens

_AWAKE = 'reason!~"Suspended|ScaledToZero"'
_AWAY = f'gantline_condition{{S, type="Servable", {_AWAKE}}} == 0'
"""Services that nobody answers for and that should be there."""
_DEGRADED = 'count by (namespace, service, reason) (gantline_condition{S, type="Degraded"} == 1)'
_FAILED = narrowed(rate("gateway_requests_total"), 'outcome=~"failed|cut"')

SECTIONS: Sections = {
    "At a glance": (
        now("Services", "short", 'count(gantline_condition{S, type="Ready"})', "That the operator knows."),
        now(
            "Not ready",
            "short",
            f'count(gantline_condition{{S, type="Ready", {_AWAKE}}} < 1) or vector(0)',
            "Not as their spec says, and neither suspended nor asleep. The table below tells why. An older revision may answer meanwhile.",
            GOOD_AT_ZERO,
        ),
        now(
            "Without any answer",
            "short",
            f"count({_AWAY}) or vector(0)",
            "No pod of any revision answers, though the service is neither suspended nor asleep. New ones count until they are up.",
            BAD_ABOVE_ZERO,
        ),
        now("Request rate", "reqps", rate("gateway_requests_total"), "Through the gateways.", noValue="no gateway"),
        now(
            "Requests held",
            "short",
            "sum(gantline_gateway_held{S})",
            "That wait at the gateways for a replica: a service wakes, or is being swapped.",
            GOOD_AT_ZERO,
            noValue="no gateway",
        ),
        now(
            "Requests that fail",
            "percentunit",
            f"({_FAILED} or vector(0)) / ({rate('gateway_requests_total')} > 0)",
            "Share of requests through the gateways that ended with an error, or in the middle of a stream.",
            (("green", None), ("red", 0.01)),
            noValue="nobody asks",
        ),
    ),
    "Services and replicas": (
        table(
            "What is not as it should be, and why",
            "string",
            {"": f'gantline_condition{{S, type!~"Degraded|Progressing", {_AWAKE}}} == 0 or gantline_condition{{S, type="Degraded"}} == 1'},
            {"namespace": "Namespace", "service": "Service", "type": "Condition", "reason": "Reason"},
            "Conditions of now. docs/operations.md has each reason and its cure; `kubectl gantline explain` says more of one service.",
            sort="Service",
            width=12,
            none="All services are as they should be",
        ),
        stacked(
            "Services by reason",
            "short",
            {"{{reason}}": 'count by (reason) (gantline_condition{S, type="Ready"})'},
            "Reasons of the condition Ready. A reason that stays and is neither Ready nor ScaledToZero is for somebody to look at.",
            width=12,
            whole=True,
            colors=BY_REASON,
            shades="red",
        ),
        count(
            "Replicas that answer",
            {"{{namespace}}/{{service}}": "max by (namespace, service) (gantline_gateway_replicas{S})"},
            "That the gateways send requests to.",
            width=6,
        ),
        stacked(
            "Nobody answers",
            "short",
            {"{{namespace}}/{{service}}": f"count by (namespace, service) ({_AWAY})"},
            "Services without any pod that answers, over time, but for those that are suspended or asleep.",
            width=6,
            whole=True,
            shades="red",
        ),
        stacked(
            "Degraded",
            "short",
            {"{{namespace}}/{{service}}: {{reason}}": _DEGRADED},
            "Services of which something failed that a person should look at.",
            width=6,
            whole=True,
            shades="orange",
        ),
        lines(
            "Changes of replicas per minute",
            "short",
            {"{{direction}}": of_all(per_minute("scalings_total", "direction"))},
            "By load. Up and down in turn for long: a target that the load swings around, see docs/autoscaling.md.",
            width=6,
        ),
    ),
    "Gateway": (
        stacked(
            "Requests by service",
            "reqps",
            {"{{namespace}}/{{service}}": rate("gateway_requests_total", "namespace, service")},
            "As they ended.",
        ),
        stacked(
            "Requests by outcome",
            "reqps",
            {"{{outcome}}": rate("gateway_requests_total", "outcome")},
            "refused: illegal or not allowed. busy: 429. failed: 500 and above. left: the client. cut: its stream broke off.",
            colors=BY_OUTCOME,
        ),
        lines(
            "Generated tokens per second",
            "short",
            {"{{namespace}}/{{service}}": tokens("completion", "namespace, service")},
            "As replicas report them to the gateways.",
        ),
        count(
            "Requests running and held",
            {"running": "sum(gantline_gateway_running{S})", "held": "sum(gantline_gateway_held{S})"},
            "held: no replica was there for them yet.",
            width=6,
        ),
        lines(
            "How long requests were held",
            "s",
            quantiles("gateway_held_seconds"),
            "Of those that waited for a replica: the price of sleep.",
            width=6,
        ),
        lines("Time in the gateway", "s", quantiles("gateway_added_seconds"), "Until a replica was asked, without holding.", width=6),
        lines(
            "Second attempts per minute",
            "short",
            {"{{cause}}": per_minute("gateway_retries_total", "cause")},
            "What one replica did not take or lost, and another one, or the same later, made good.",
            width=6,
        ),
        lines(
            "Prefix cache hits",
            "percentunit",
            {"hits": f"{tokens('cached')} / {tokens('prompt')}"},
            "Share of prompt tokens. Low with repeated prompts and several replicas: look at how the gateway chooses, docs/gateway.md.",
            width=6,
            most=1,
        ),
        lines(
            "Unserved requests per minute",
            "short",
            {"{{code}}": of_all(per_minute("gateway_unserved_total", "code"))},
            "That reached no service, by the error's code: an unknown model, a wrong key, a body that is no request.",
            width=6,
        ),
        lines(
            "Generated tokens by API key",
            "short",
            {"{{key}}": of_all(rate("gateway_key_completion_tokens_total", "key"))},
            "Per second, of installations whose gateways ask for keys.",
            width=6,
        ),
        lines(
            "Key limits reached per minute",
            "short",
            {"{{key}}, {{limit}}": of_all(per_minute("gateway_key_limited_total", "key, limit"))},
            "Requests that a limit of their API key refused. tokens: tokens a minute. concurrency: requests at once.",
            width=6,
        ),
    ),
    "Volumes, devices, operator": (
        lines(
            "Cache volumes",
            "bytes",
            {
                "{{namespace}}/{{claim}}, {{state}}": "max by (namespace, claim, state) (gantline_cache_bytes)",
                "{{namespace}}/{{claim}}, most": "max by (namespace, claim) (gantline_cache_limit_bytes)",
            },
            "Bytes of model artefacts. Unused ones are removed when there is need of room, up to the most that a volume may hold.",
            width=6,
        ),
        table(
            "Pods replaced since a GPU failed",
            "short",
            {"Pods": "sum by (node) (gantline_gpu_failures_total)"},
            {"node": "Node"},
            "By node, since the operator's start. Twice on one node: take it out of service.",
            sort="Pods",
            descending=True,
            width=6,
            none="None since the operator's start",
        ),
        count(
            "Operators that lead",
            {"leading": "sum(gantline_leader)", "running": "count(gantline_leader)"},
            "One leads, however many run. None: services serve on, but nothing is changed or repaired.",
            width=6,
        ),
        lines(
            "Services to be reconciled",
            "short",
            {"waiting": "max(gantline_queue_depth)"},
            "In the operator's queue.",
            width=6,
        ),
        lines(
            "Longest wait to be reconciled",
            "s",
            {"oldest": "max(gantline_queue_oldest_seconds)"},
            "Above a minute: the operator is behind.",
            width=6,
        ),
        lines(
            "Time of a reconcile",
            "s",
            {
                f"p{share}": f"histogram_quantile(0.{share}, sum by (le) (rate(gantline_reconcile_seconds_bucket[R])))"
                for share in (50, 95, 99)
            },
            "One look at one service.",
            width=6,
        ),
        stacked(
            "Reconciles by result",
            "ops",
            {"{{result}}": of_all(rate("reconciles_total", "result"))},
            "done, retry (soon again), error.",
            width=6,
            colors=BY_RESULT,
        ),
        stacked(
            "API server requests by status",
            "reqps",
            {"{{status}}": of_all(rate("api_requests_total", "status"))},
            "Of the operator. 0: no answer. 409: somebody else wrote first, it is tried again. 403: a right is missing.",
            width=6,
            colors=BY_STATUS,
        ),
    ),
}
