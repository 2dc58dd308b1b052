"""Writes the tables of docs/server.md that repeat what the code says: settings, other engines' flags and metrics. `--check` only compares
(exit code 1 if stale).

Each table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; everything else in the file is written by hand.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from gantline_runtime.config import EngineConfig, ServerConfig
from gantline_runtime.engine_messages import EngineReport
from gantline_runtime.foreign_flags import FOREIGN_FLAGS
from gantline_runtime.server.lifecycle import State
from gantline_runtime.server.metrics import Metrics

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "server.md"


def settings_table(cls: type) -> str:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for item in dataclasses.fields(cls):
        rows.append(f"| `--{item.name.replace('_', '-')}` | `{_shown(item.default)}` | {item.metadata['help']} |")
    return "\n".join(rows)


def _shown(default: object) -> object:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "auto" if default is None else default


def foreign_table() -> str:
    theirs: dict[str, list[str]] = {}
    for flag, ours in FOREIGN_FLAGS.items():
        theirs.setdefault(ours, []).append(f"`{flag}`")
    flag = re.compile("(--[a-z-]+)")
    rows = ["| {} | {} |".format(", ".join(flags), flag.sub(r"`\1`", ours)) for ours, flags in theirs.items()]
    return "\n".join(["| of vLLM, SGLang or LMDeploy | here |", "|---|---|", *rows])


def metrics_table() -> str:
    metrics = Metrics("0")
    metrics.render(State.LOADING)
    parts = {"promised_bytes": {"weights": 0}, "reserved_bytes": {"weights": 0}}
    metrics.engine(EngineReport(step_times={"schedule": 0.0}, about={"architecture": "", "implementation": "", "reason": ""}, **parts))
    metrics.http("/health", "GET", 200)
    metrics.startup("weights", 0.0)
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in sorted(metrics.registry.collect(), key=lambda family: family.name):
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        names = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {names} | {family.documentation} |")
    return "\n".join(rows)


def fill(text: str) -> str:
    tables = {
        "server settings": settings_table(ServerConfig),
        "engine settings": settings_table(EngineConfig),
        "other engines' flags": foreign_table(),
        "metrics": metrics_table(),
    }
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.S)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)  # type: ignore[misc]
        assert count == 1, f"docs/server.md has {count} places for the table of {name}"
    return text


def main() -> int:
    text = DOCUMENT.read_text()
    filled = fill(text)
    if "--check" in sys.argv[1:]:
        if filled != text:
            print("docs/server.md is stale: run python scripts/server_docs.py", file=sys.stderr)
        return int(filled != text)
    DOCUMENT.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
