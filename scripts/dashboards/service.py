"""The board `service`: what the pods of a service do, for whoever looks after one model."""

from __future__ import annotations

from scripts.dashboards.colors import BY_END, BY_STATE, BY_STATUS
from scripts.dashboards.panels import Sections, count, lines, now, stacked, table
from scripts.dashboards.queries import narrowed, per_minute, quantiles, rate

_ASKED = 'route!~"/metrics|/health|/ready|/internal/.*"'
"""Requests of clients, without those of Kubernetes, Prometheus and the gateway."""
_HTTP = narrowed(rate("http_requests_total"), _ASKED)
_BROKEN_HTTP = narrowed(rate("http_requests_total"), f'{_ASKED}, status=~"5.."')

SECTIONS: Sections = {
    "At a glance": (
        now(
            "Servers ready",
            "short",
            'sum(gantline_state{S, state="ready"})',
            "Pods that take requests. Red: none does; see Servers by state, and the fleet's table for why.",
            (("red", None), ("green", 1)),
        ),
        now(
            "Requests that wait",
            "short",
            "sum(gantline_num_requests_waiting{S})",
            "In the engines' queues, now. More than a few for long: the service needs more replicas or a larger cache.",
            (("green", None), ("orange", 1)),
        ),
        now(
            "First token, p95",
            "s",
            quantiles("time_to_first_token_seconds")["p95"],
            "Nineteen of twenty requests had their first token within this time.",
            noValue="nobody asks",
        ),
        now(
            "Token gap, p95",
            "s",
            quantiles("inter_token_latency_seconds")["p95"],
            "Nineteen of twenty pauses between two tokens were shorter.",
            noValue="nobody asks",
        ),
        now(
            "Fullest cache",
            "percentunit",
            "max(gantline_kv_cache_usage_perc{S})",
            "Share of KV blocks that requests hold, in the pod with the most. Full, and preemptions: too many at once for this memory.",
            (("green", None), ("orange", 0.95)),
            max=1,
        ),
        now(
            "Requests that fail",
            "percentunit",
            f"({_BROKEN_HTTP} or vector(0)) / ({_HTTP} > 0)",
            "Share of clients' requests that were answered with a status of 500 and above.",
            (("green", None), ("red", 0.01)),
            noValue="nobody asks",
        ),
    ),
    "Requests": (
        stacked(
            "HTTP requests by status",
            "reqps",
            {"{{status}}": narrowed(rate("http_requests_total", "status"), _ASKED)},
            "Of clients, without probes, scrapes and what the gateway asks for itself. 429: a full queue. 503: not ready, or draining.",
            colors=BY_STATUS,
        ),
        stacked(
            "Answers by how they ended",
            "reqps",
            {"{{finished_reason}}": rate("request_success_total", "finished_reason")},
            "stop: by the model. length: by a limit. abort: the client left. error: the engine could not go on.",
            colors=BY_END,
        ),
        count(
            "Requests in the engine",
            {"running": "sum(gantline_num_requests_running{S})", "waiting": "sum(gantline_num_requests_waiting{S})"},
            "Of all pods chosen. Requests wait when the batch or the cache is full.",
        ),
        lines(
            "Time to first token",
            "s",
            quantiles("time_to_first_token_seconds"),
            "From admission to the first token: wait and prefill.",
            width=6,
        ),
        lines("Time between tokens", "s", quantiles("inter_token_latency_seconds"), "Between two tokens of one answer.", width=6),
        lines("Wait in the queue", "s", quantiles("request_queue_time_seconds"), "From arrival at the engine to the first step.", width=6),
        lines("Whole requests", "s", quantiles("e2e_request_latency_seconds"), "From admission to the end of the answer.", width=6),
    ),
    "Engine and cache": (
        lines(
            "Tokens per second",
            "short",
            {"prompt": rate("prompt_tokens_total"), "generated": rate("generation_tokens_total")},
            "Of all pods chosen. Prompt tokens count whether they were computed or in the prefix cache.",
        ),
        lines(
            "Where a step's time goes",
            "s",
            {"{{part}}": f"{rate('engine_step_seconds_total', 'part')} / ignoring(part) group_left {rate('engine_steps_total')}"},
            "Mean of one step. device: the device has a step to run. The others are the host's, mostly meanwhile: parts do not add up.",
        ),
        lines(
            "Predicted tokens that wait",
            "short",
            {"tokens": "sum(gantline_waiting_tokens{S})"},
            "Prompt and expected answer of what waits: by this a queue is full (--max-waiting-tokens), and Retry-After is computed.",
        ),
        lines(
            "Cache in use",
            "percentunit",
            {"{{pod}}": "max by (pod) (gantline_kv_cache_usage_perc{S})"},
            "Share of KV blocks that requests hold.",
            most=1,
        ),
        lines(
            "Prefix cache hits",
            "percentunit",
            {"hits": f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}"},
            "Share of prompt tokens that were not computed again.",
            most=1,
        ),
        lines(
            "Preemptions per minute",
            "short",
            {"preemptions": per_minute("num_preemptions_total")},
            "Requests that gave up their blocks and are computed again. Steadily above zero: the cache is too small for so many at once.",
        ),
    ),
    "Lengths, start, memory": (
        lines("Lengths of prompts", "short", quantiles("request_prompt_tokens"), "In tokens."),
        lines("Lengths of answers", "short", quantiles("request_generation_tokens"), "In tokens."),
        stacked(
            "Servers by state",
            "short",
            {"{{state}}": "sum by (state) (gantline_state{S}) > 0"},
            "A pod that stays loading or warming: its log says what it does. dead: Kubernetes starts it again.",
            whole=True,
            colors=BY_STATE,
        ),
        table(
            "Phases of the start",
            "s",
            {"Time": "max by (phase) (gantline_startup_seconds{S})"},
            {"phase": "Phase"},
            "The longest of the pods chosen. total is from the process's start until it was ready.",
            sort="Time",
            descending=True,
            width=12,
            none="No server has told yet",
        ),
        table(
            "Memory of one device",
            "bytes",
            {
                "Planned": "max by (part) (gantline_memory_promised_bytes{S})",
                "Taken": "max by (part) (gantline_memory_reserved_bytes{S})",
            },
            {"part": "Part"},
            "What the operator's formula expects, beside what the engine took. The next plan for this model and device knows both.",
            sort="Part",
            width=12,
            none="No server has told yet",
        ),
    ),
}
