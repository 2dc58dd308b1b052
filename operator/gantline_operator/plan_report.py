"""A decision as a person reads it, and as a program does: what `gantline plan` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from gantline_runtime.config import to_arguments
from gantline_runtime.model_facts import ModelFacts

from gantline_operator.plan_status import to_status
from gantline_operator.plan_types import Plan, Rejected
from gantline_operator.shapes import readable

__all__ = ["build_report", "render_table"]

_WIDTH = 140


def build_report(service: str, facts: ModelFacts, answer: Plan | Rejected) -> dict[str, Any]:
    """The decision as plain JSON; `plan` is what `status.plan` would hold, but with every rejected option."""
    rejected = [{"option": row.option, "reason": row.reason.value, "message": row.message} for row in answer.rejected]
    report: dict[str, Any] = {"service": service, "model": facts.to_json(), "planned": isinstance(answer, Plan)}
    if isinstance(answer, Rejected):
        return {**report, "reason": answer.reason.value, "message": answer.message, "cure": answer.cure, "rejected": rejected}
    plan = {key: value for key, value in to_status(answer).items() if key != "rejected"}
    return {**report, "plan": {**plan, "arguments": to_arguments(answer.engine)}, "rejected": rejected}


def render_table(report: dict[str, Any]) -> str:
    """The report as text, at most 140 characters wide."""
    model = report["model"]
    title = f"{report['service']}: {model['name'] or 'model'} ({model['architecture']}, {readable(model['weightBytes'])} of weights)"
    body = _render_plan(report["plan"]) if report["planned"] else _render_rejection(report)
    rows = [(row["option"], row["reason"], row["message"]) for row in report["rejected"]]
    return "\n".join([title, *body, *_render_rejected(rows)]) + "\n"


def _render_plan(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory"]
    where = f"{plan['count']} x {plan['product']} ({plan['resource']})" if plan["resource"] else "CPU"
    parts = ", ".join(f"{readable(memory[key])} {key}" for key in ("weights", "workspace", "cache"))
    labels = ", ".join(f"{label['key']} in ({', '.join(label['values'])})" for label in plan["nodeLabels"])
    made = " (made by a quantize Job)" if plan["quantize"] else ""
    sessions = f"up to {plan['sessionLen']} tokens; cache of {memory['capacityTokens']} tokens; batches of up to {plan['maxBatchSize']}"
    facts = [
        ("devices", where + (", none free now: pods will wait (WaitingForCapacity)" if plan["waiting"] else "")),
        ("backend", f"{plan['backend']}, image {plan['image']}, tensor parallelism {plan['tensorParallel']}"),
        ("precision", f"{plan['precision']}{made}, activations {plan['dtype']}"),
        ("sessions", sessions),
        ("memory", f"{readable(memory['total'])} of {readable(memory['usable'])} usable on each: {parts}"),
        ("pod", f"{readable(plan['memoryBytes'])} of memory, {plan['cpuMillis']}m CPU" + (f", on nodes with {labels}" if labels else "")),
        ("start", f"about {plan['loadSeconds']} s from container to ready"),
    ]
    return [f"  {name:<10} {line}" for name, text in facts for name, line in _wrap(name, text, 13)]


def _wrap(name: str, text: str, indent: int) -> list[tuple[str, str]]:
    lines = textwrap.wrap(text, _WIDTH - indent, break_long_words=False)
    return [(name if index == 0 else "", line) for index, line in enumerate(lines)]


def _render_rejection(report: dict[str, Any]) -> list[str]:
    lines = textwrap.wrap(f"rejected: {report['reason']}: {report['message']}", _WIDTH - 2)
    return [f"  {line}" for line in [*lines, *textwrap.wrap(report["cure"], _WIDTH - 2)]]


def _render_rejected(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Option, reason, message in columns."""
    if not rows:
        return []
    first, second = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    first = min(first, 60)
    out = ["  turned down:"]
    for option, reason, message in rows:
        lines = textwrap.wrap(message, max(30, _WIDTH - first - second - 8)) or [""]
        out.append(f"    {option:<{first}}  {reason:<{second}}  {lines[0]}")
        out += [" " * (first + second + 8) + line for line in lines[1:]]
    return out
