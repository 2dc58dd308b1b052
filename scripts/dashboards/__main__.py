"""Writes charts/gantline/dashboards/*.json, the Grafana dashboards, from `service.py` and `fleet.py`. `--check` only compares.

A panel is a title, a unit of Grafana's, its queries by legend, and what it tells. `make dashboards` draws both boards with Grafana's
components over a real Prometheus; look at its pictures after a change.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.dashboards import fleet, service
from scripts.dashboards.panels import Panel, Sections

Object = dict[str, Any]
FOLDER = Path(__file__).resolve().parents[2] / "charts" / "gantline" / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24
_HEADING_HEIGHT = 1


@dataclass(frozen=True)
class Board:
    """`variables`: label -> the query for its choices. Panels are selected by all of them."""

    title: str
    variables: Mapping[str, str]
    sections: Sections


BOARDS = {
    "service": Board(
        "Gantline: service",
        {
            "namespace": "label_values(gantline_state, namespace)",
            "service": 'label_values(gantline_state{namespace=~"$namespace"}, service)',
            "pod": 'label_values(gantline_state{namespace=~"$namespace", service=~"$service"}, pod)',
        },
        service.SECTIONS,
    ),
    "fleet": Board(
        "Gantline: fleet",
        {
            "namespace": "label_values(gantline_condition, namespace)",
            "service": 'label_values(gantline_condition{namespace=~"$namespace"}, service)',
        },
        fleet.SECTIONS,
    ),
}


def build(name: str) -> Object:
    board = BOARDS[name]
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    selector = ", ".join(f'{label}=~"${label}"' for label in board.variables)
    panels = [{"id": number + 1, **panel} for number, panel in enumerate(_laid_out(board.sections, selector))]
    other = next(key for key in BOARDS if key != name)
    link = {
        "title": BOARDS[other].title,
        "type": "link",
        "url": f"/d/gantline-{other}",
        "icon": "dashboard",
        "keepTime": True,
        "includeVars": True,
    }
    return {
        "title": board.title,
        "uid": f"gantline-{name}",
        "tags": ["gantline"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [link],
        "templating": {"list": [source, *(_variable(label, query) for label, query in board.variables.items())]},
        "panels": panels,
    }


def _variable(name: str, query: str) -> Object:
    """`.*` for all: it matches series without the label, of a server that no Kubernetes runs."""
    choice = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    about = {"label": name.capitalize(), "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1}
    return {"name": name, "type": "query", "datasource": _SOURCE, **about, **choice}


def _laid_out(sections: Sections, selector: str) -> Iterator[Object]:
    """A heading for each section, and its panels from left to right."""
    y = 0
    for heading, panels in sections.items():
        place = {"x": 0, "y": y, "w": _COLUMNS, "h": _HEADING_HEIGHT}
        yield {"type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        x, y, height = 0, y + _HEADING_HEIGHT, 0
        for panel in panels:
            if x + panel.width > _COLUMNS:
                x, y = 0, y + height
            height = panel.height
            yield {**_panel(panel, selector), "gridPos": {"x": x, "y": y, "w": panel.width, "h": height}}
            x += panel.width
        y += height


def _panel(panel: Panel, selector: str) -> Object:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": _spelled_out(query, selector), **_form(panel, legend)}
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **panel.defaults},
            "overrides": [_colored(*item) for item in panel.colors.items()],
        },
        "options": dict(panel.options),
        "targets": targets,
        **({"transformations": list(panel.transformations)} if panel.transformations else {}),
    }


def _colored(legend: str, color: str) -> Object:
    properties = [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}]
    return {"matcher": {"id": "byRegexp", "options": legend}, "properties": properties}


def _form(panel: Panel, legend: str) -> Object:
    form = {"format": "table"} if panel.kind == "table" else {"format": "time_series", "legendFormat": legend}
    return {**form, "instant": panel.instant, "range": not panel.instant}


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
        print(f"{', '.join(map(str, stale))}: stale; run python -m scripts.dashboards", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
