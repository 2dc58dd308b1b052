"""Every reason that a status, an event or a container can give has its line in the runbook."""

from __future__ import annotations

import re
from pathlib import Path

from gantline_operator.conditions import EventReason, Reason
from gantline_runtime import termination

OPERATIONS = (Path(__file__).parents[2] / "docs/operations.md").read_text()


def test_every_reason_and_event_has_its_line() -> None:
    rows = [line for line in OPERATIONS.splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {reason.value for reason in Reason} <= named
    events = OPERATIONS.split("## Events")[1].split("##")[0]
    assert {reason.value for reason in EventReason} <= set(re.findall(r"`(\w+)`", events))


def test_reasons_of_containers_are_reasons_of_conditions() -> None:
    peaceful = {termination.Reason.COMPLETED, termination.Reason.DRAINED}
    assert {reason.value for reason in termination.Reason if reason not in peaceful} <= {reason.value for reason in Reason}
