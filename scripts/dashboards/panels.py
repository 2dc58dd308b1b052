"""Kinds of panels: each function answers what one shows, without its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.dashboards.colors import NONE, Colors, Steps

__all__ = ["Panel", "Sections", "count", "lines", "now", "stacked", "table"]

Object = dict[str, Any]
Sections = Mapping[str, tuple["Panel", ...]]
"""Heading -> panels, from left to right."""


@dataclass(frozen=True)
class Panel:
    """`about` is shown where a reader points at the title. `kind` is Grafana's name of the panel's type."""

    title: str
    unit: str
    queries: Mapping[str, str]
    about: str
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of the fields' configuration, beside the unit."""
    options: Mapping[str, Any] = field(default_factory=dict)
    transformations: Sequence[Object] = ()
    colors: Colors = field(default_factory=dict)
    instant: bool = False
    """Of now alone, instead of over the time that is looked at."""


_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
_LINES = {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}}
_LAST = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
_CUSTOM = {"lineWidth": 1, "fillOpacity": 0, "showPoints": "auto", "spanNulls": False}


def lines(
    title: str, unit: str, queries: Mapping[str, str], about: str, *, width: int = 8, most: float | None = None, colors: Colors = NONE
) -> Panel:
    """Lines over time from zero, up to `most` where that is known."""
    top = {} if most is None else {"max": most}
    defaults = {"min": 0, **top, "custom": _CUSTOM}
    return Panel(title, unit, queries, about, width=width, defaults=defaults, options=_LINES, colors=colors)


def stacked(
    title: str,
    unit: str,
    queries: Mapping[str, str],
    about: str,
    *,
    width: int = 8,
    whole: bool = False,
    colors: Colors = NONE,
    shades: str = "",
) -> Panel:
    """Parts of a sum, one on the other. `whole`: things that one counts, so the scale has no halves. `shades`: of this colour, what has
    none of `colors`."""
    custom = {**_CUSTOM, "fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
    color = {"color": {"mode": "shades", "fixedColor": shades}} if shades else {}
    defaults = {"min": 0, "custom": custom, **({"decimals": 0} if whole else {}), **color}
    return Panel(title, unit, queries, about, width=width, defaults=defaults, options=_LINES, colors=colors)


def count(title: str, queries: Mapping[str, str], about: str, *, width: int = 8) -> Panel:
    """Lines of what one counts, in steps."""
    defaults = {"min": 0, "decimals": 0, "custom": {**_CUSTOM, "lineInterpolation": "stepAfter"}}
    return Panel(title, "short", queries, about, width=width, defaults=defaults, options=_LINES)


def now(title: str, unit: str, query: str, about: str, steps: Steps = (("text", None),), **defaults: Any) -> Panel:
    """One number, and how it came there."""
    thresholds = {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}
    options = {**_LAST, "colorMode": "value", "graphMode": "area", "justifyMode": "auto", "orientation": "auto", "textMode": "value"}
    fields = {"min": 0, "thresholds": thresholds, "color": {"mode": "thresholds"}, **defaults}
    return Panel(title, unit, {"now": query}, about, "stat", 4, 4, fields, options)


def table(
    title: str,
    unit: str,
    queries: Mapping[str, str],
    labels: Mapping[str, str],
    about: str,
    *,
    sort: str,
    none: str,
    width: int = 8,
    descending: bool = False,
) -> Panel:
    """The series of now, a row for each set of labels: columns are labels -> headings, then headings -> values of a query. A query without
    heading only says which rows there are. `sort` is a heading; `none` is said where there are no series."""
    letters = [chr(ord("A") + i) for i in range(len(queries))]
    names = [f"Value #{letter}" for letter in letters] if len(queries) > 1 else ["Value"]
    columns = {**labels, **{name: heading for name, heading in zip(names, queries, strict=True) if heading}}
    order = {"indexByName": {name: i for i, name in enumerate(columns)}, "renameByName": columns, "excludeByName": {}}
    transformations = [
        {"id": "merge", "options": {}},
        {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}},
        {"id": "organize", "options": order},
        {"id": "sortBy", "options": {"fields": {}, "sort": [{"field": sort, "desc": descending}]}},
    ]
    defaults = {"noValue": none, "custom": {"align": "left"}}
    options = {"showHeader": True, "cellHeight": "sm"}
    return Panel(title, unit, queries, about, "table", width, 8, defaults, options, transformations, instant=True)
