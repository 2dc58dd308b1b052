"""Writes charts/gantline/dashboards/serving.json, the Grafana dashboard of serving pods, from the table below. `--check` only compares.

A panel is a title, a unit of Grafana's, and its queries by legend. `S` stands for the selector by namespace and pod, `R` for the interval.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "charts" / "gantline" / "dashboards" / "serving.json"

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 8, 8


def _quantiles(metric: str) -> dict[str, str]:
    return {f"p{share}": f"histogram_quantile(0.{share}, sum by (le) (rate(gantline_{metric}_bucket{{S}}[R])))" for share in (50, 95, 99)}


def _rate(metric: str, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(gantline_{metric}{{S}}[R]))"


PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
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


def build() -> dict[str, Any]:
    variables = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _variable("namespace", "label_values(gantline_state, namespace)"),
        _variable("pod", 'label_values(gantline_state{namespace=~"$namespace"}, pod)'),
    ]
    return {
        "title": "Gantline: serving",
        "uid": "gantline-serving",
        "tags": ["gantline"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": [_panel(number, *panel) for number, panel in enumerate(PANELS)],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    """`.*` for all: it matches series without the label, of a server that no Kubernetes runs."""
    choice = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {"name": name, "type": "query", "datasource": _SOURCE, "query": {"query": query, "refId": name}, "refresh": 2, **choice}


def _panel(number: int, title: str, unit: str, queries: dict[str, str]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": _spelled_out(query), "legendFormat": legend}
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


def _spelled_out(query: str) -> str:
    return query.replace("{S}", '{namespace=~"$namespace", pod=~"$pod"}').replace("[R]", "[$__rate_interval]")


def main() -> int:
    text = json.dumps(build(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        stale = not DOCUMENT.exists() or DOCUMENT.read_text() != text
        if stale:
            print(f"{DOCUMENT} is stale: run python scripts/dashboard.py", file=sys.stderr)
        return int(stale)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
