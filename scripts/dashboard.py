"""Writes charts/gantline/dashboards/*.json, the Grafana dashboards, from the tables below. `--check` only compares.

    service   what the pods of a service do: for whoever looks after one model
    fleet     all services beside each other, the gateway, the operator: for whoever looks after the installation

A panel is a title, a unit of Grafana's, and its queries by legend. `{S}` stands for the board's selector, `[R]` for the interval.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "charts" / "gantline" / "dashboards"

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 8, 8

Panels = tuple[tuple[str, str, dict[str, str]], ...]


@dataclass(frozen=True)
class Board:
    """`variables`: label -> the query for its choices. Panels are selected by all of them."""

    title: str
    variables: dict[str, str]
    panels: Panels


def _quantiles(metric: str) -> dict[str, str]:
    return {f"p{share}": f"histogram_quantile(0.{share}, sum by (le) (rate(gantline_{metric}_bucket{{S}}[R])))" for share in (50, 95, 99)}


def _rate(metric: str, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(gantline_{metric}{{S}}[R]))"


def _tokens(kind: str, by: str = "") -> str:
    """As the gateways count them."""
    return _rate("gateway_tokens_total", by).replace("{S}", f'{{S, kind="{kind}"}}')


def _of_all(metric: str, by: str = "") -> str:
    """The same of what belongs to no service."""
    return _rate(metric, by).replace("{S}", "")


_SERVICE: Panels = (
    ("Servers by state", "short", {"{{state}}": "sum by (state) (gantline_state{S})"}),
    ("HTTP requests by status", "reqps", {"{{status}}": _rate("http_requests_total", "status")}),
    ("Answers by how they ended", "reqps", {"{{finished_reason}}": _rate("request_success_total", "finished_reason")}),
    ("Time to first token", "s", _quantiles("time_to_first_token_seconds")),
    ("Time between tokens", "s", _quantiles("inter_token_latency_seconds")),
    ("Whole requests", "s", _quantiles("e2e_request_latency_seconds")),
    ("Wait in the queue", "s", _quantiles("request_queue_time_seconds")),
    (
        "Requests in the engine",
        "short",
        {"running": "sum(gantline_num_requests_running{S})", "waiting": "sum(gantline_num_requests_waiting{S})"},
    ),
    ("Predicted tokens that wait", "short", {"tokens": "sum(gantline_waiting_tokens{S})"}),
    ("Tokens", "short", {"prompt tokens/s": _rate("prompt_tokens_total"), "generated tokens/s": _rate("generation_tokens_total")}),
    ("Cache in use", "percentunit", {"{{pod}}": "gantline_kv_cache_usage_perc{S}"}),
    (
        "Prompt tokens that the prefix cache had",
        "percentunit",
        {"hits": f"{_rate('prefix_cache_hits_total')} / {_rate('prefix_cache_queries_total')}"},
    ),
    ("Preemptions", "ops", {"preemptions/s": _rate("num_preemptions_total")}),
    (
        "Where a step's time goes",
        "s",
        {"{{part}}": f"{_rate('engine_step_seconds_total', 'part')} / ignoring(part) group_left {_rate('engine_steps_total')}"},
    ),
    ("Lengths of prompts", "short", _quantiles("request_prompt_tokens")),
    ("Lengths of answers", "short", _quantiles("request_generation_tokens")),
    ("Phases of the start", "s", {"{{phase}}": "max by (phase) (gantline_startup_seconds{S})"}),
    (
        "Memory of one device",
        "bytes",
        {
            "{{part}}, planned": "max by (part) (gantline_memory_promised_bytes{S})",
            "{{part}}, taken": "max by (part) (gantline_memory_reserved_bytes{S})",
        },
    ),
)


_FLEET: Panels = (
    ("Services by why they are ready or not", "short", {"{{reason}}": 'count by (reason) (gantline_condition{S, type="Ready"})'}),
    ("Nobody answers", "short", {"{{namespace}}/{{service}}: {{reason}}": 'gantline_condition{S, type="Servable"} == 0'}),
    ("Degraded", "short", {"{{namespace}}/{{service}}: {{reason}}": 'gantline_condition{S, type="Degraded"} == 1'}),
    ("Requests by service", "reqps", {"{{namespace}}/{{service}}": _rate("gateway_requests_total", "namespace, service")}),
    ("Requests by outcome", "reqps", {"{{outcome}}": _rate("gateway_requests_total", "outcome")}),
    (
        "Generated tokens by service",
        "short",
        {"{{namespace}}/{{service}}": _tokens("completion", "namespace, service")},
    ),
    ("Replicas that answer", "short", {"{{namespace}}/{{service}}": "max by (namespace, service) (gantline_gateway_replicas{S})"}),
    (
        "Requests that run and that wait for a replica",
        "short",
        {"running": "sum(gantline_gateway_running{S})", "held": "sum(gantline_gateway_held{S})"},
    ),
    ("How long requests were held", "s", _quantiles("gateway_held_seconds")),
    ("Time in the gateway", "s", _quantiles("gateway_added_seconds")),
    ("Second attempts by cause", "ops", {"{{cause}}": _rate("gateway_retries_total", "cause")}),
    (
        "Prompt tokens that prefix caches had",
        "percentunit",
        {"hits": f"{_tokens('cached')} / {_tokens('prompt')}"},
    ),
    ("Answers' tokens by API key", "short", {"{{key}}": _of_all("gateway_key_completion_tokens_total", "key")}),
    ("Refused by limits of API keys", "reqps", {"{{key}}, {{limit}}": _of_all("gateway_key_limited_total", "key, limit")}),
    ("Changes of replicas by load", "ops", {"{{direction}}": _of_all("scalings_total", "direction")}),
    ("Cache volumes", "bytes", {"{{namespace}}/{{claim}}, {{state}}": "max by (namespace, claim, state) (gantline_cache_bytes)"}),
    ("Operators that lead", "short", {"leading": "sum(gantline_leader)"}),
    ("Reconciles by result", "ops", {"{{result}}": _of_all("reconciles_total", "result")}),
    (
        "Time of a reconcile",
        "s",
        {f"p{share}": f"histogram_quantile(0.{share}, sum by (le) (rate(gantline_reconcile_seconds_bucket[R])))" for share in (50, 99)},
    ),
    ("Services that wait to be reconciled", "short", {"waiting": "max(gantline_queue_depth)"}),
    ("Requests to the API server by status", "reqps", {"{{status}}": _of_all("api_requests_total", "status")}),
)

BOARDS = {
    "service": Board(
        "Gantline: service",
        {
            "namespace": "label_values(gantline_state, namespace)",
            "service": 'label_values(gantline_state{namespace=~"$namespace"}, service)',
            "pod": 'label_values(gantline_state{namespace=~"$namespace", service=~"$service"}, pod)',
        },
        _SERVICE,
    ),
    "fleet": Board(
        "Gantline: fleet",
        {
            "namespace": "label_values(gantline_condition, namespace)",
            "service": 'label_values(gantline_condition{namespace=~"$namespace"}, service)',
        },
        _FLEET,
    ),
}


def build(name: str) -> dict[str, Any]:
    board = BOARDS[name]
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    selector = ", ".join(f'{label}=~"${label}"' for label in board.variables)
    return {
        "title": board.title,
        "uid": f"gantline-{name}",
        "tags": ["gantline"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, *(_variable(label, query) for label, query in board.variables.items())]},
        "panels": [_panel(number, selector, *panel) for number, panel in enumerate(board.panels)],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    """`.*` for all: it matches series without the label, of a server that no Kubernetes runs."""
    choice = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {"name": name, "type": "query", "datasource": _SOURCE, "query": {"query": query, "refId": name}, "refresh": 2, **choice}


def _panel(number: int, selector: str, title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": _spelled_out(query, selector), "legendFormat": legend}
        for i, (legend, query) in enumerate(queries.items())
    ]
    per_row = 24 // _WIDTH
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": {"x": number % per_row * _WIDTH, "y": number // per_row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _spelled_out(query: str, selector: str) -> str:
    return query.replace("{S", "{" + selector).replace("[R]", "[$__rate_interval]")


def main() -> int:
    stale = []
    for name in BOARDS:
        document, text = FOLDER / f"{name}.json", json.dumps(build(name), indent=1) + "\n"
        if not document.exists() or document.read_text() != text:
            stale.append(document)
            if "--check" not in sys.argv[1:]:
                document.write_text(text)
    if stale and "--check" in sys.argv[1:]:
        print(f"{', '.join(map(str, stale))}: stale; run python scripts/dashboard.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
