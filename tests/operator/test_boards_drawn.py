"""The Grafana dashboards over a real Prometheus in a real browser: `make dashboards`, which leaves pictures in build/dashboards.

They are drawn by the panel components that Grafana publishes (`@grafana/ui`), not by Grafana: what Grafana does around them (queries,
variables, the grid) is done by `boards/page`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster

from tests.operator.boards.browser import browser
from tests.operator.boards.components import built_page
from tests.operator.boards.drawing import Drawing, draw, serving_pages
from tests.operator.boards.installation import NAMESPACE, installation
from tests.operator.boards.prometheus import SCRAPE_S, TARGETS, prometheus
from tests.operator.boards.traffic import keep_busy
from tests.operator.harness import wait_reason
from tests.runtime.server_process import ROOT

pytestmark = pytest.mark.skipif(
    not os.environ.get("GANTLINE_DASHBOARDS"), reason="needs a browser and Grafana's components: make dashboards"
)
PICTURES = ROOT / "build" / "dashboards"
QUIET = {"Pods replaced since a GPU failed": "there is no GPU that could fail"}
"""Panels without data here, and why."""
WIDE_PX, NARROW_PX = 1600, 1280
"""A desktop's window, and a laptop's or one with Grafana's menu beside the panels."""
CHOSEN: dict[str, dict[str, list[str]]] = {"fleet": {}, "service": {"namespace": [NAMESPACE], "service": ["chat"]}}
"""Boards, and what is chosen in them: one service, as whoever looks after it would."""


@pytest.fixture(scope="module")
def found(api_cluster: ApiCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """By board: what is wrong with it."""
    folder = tmp_path_factory.mktemp("boards")
    files = built_page(folder)
    (folder / TARGETS).write_text("[]")
    with prometheus(folder) as url:
        began = time.time()
        with installation(api_cluster, folder) as made:
            wait_reason(api_cluster, "chat", NAMESPACE, "Ready", timeout_s=180)
            keep_busy(made.gateway.url, lambda: made.pods.lose("chat"))
            time.sleep(2 * SCRAPE_S)
            shown = {"from": int(began * 1000), "to": int(time.time() * 1000), "scrape_s": SCRAPE_S}
            drawings = [Drawing(name, _board(name), url, shown, chosen) for name, chosen in CHOSEN.items()]
            yield _draw_all([*drawings, Drawing("faulty", _faulty(), url, shown)], files, folder)


def _board(name: str) -> dict[str, Any]:
    board: dict[str, Any] = json.loads((ROOT / "charts/gantline/dashboards" / f"{name}.json").read_text())
    return board


def _faulty() -> dict[str, Any]:
    """The first panels of a board, each with a fault of its own."""
    board = _board("service")
    panels = [panel for panel in board["panels"] if panel["type"] == "timeseries"][:8]
    unit, kind, option, none, wrong, cut, override, over = panels
    unit["fieldConfig"]["defaults"]["unit"] = "furlongs"
    kind["type"] = "graph"
    option["options"] |= {"stack": True, "tooltip": {"mode": "all"}}
    none["targets"] = [{**none["targets"][0], "expr": "gantline_nothing"}]
    wrong["targets"] = [{**wrong["targets"][0], "expr": "sum(gantline_state{$unheard})"}]
    cut["title"] = "A title of very many words, " * 4
    override["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "bySmell", "options": ""},
            "properties": [{"id": "shine", "value": 1}, {"id": "color", "value": {"mode": "fixed", "fixedColor": "reddish"}}],
        }
    ]
    over["gridPos"] = {**override["gridPos"], "y": override["gridPos"]["y"] + 2}
    for number, panel in enumerate(panels):
        panel["title"] = panel["title"] if panel is cut else f"faulty {number}"
    return {**board, "panels": panels}


def _draw_all(drawings: list[Drawing], files: dict[str, Path], folder: Path) -> dict[str, list[str]]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium") or "chromium"
    with serving_pages(files, drawings) as url, browser(program, folder) as page:
        return {
            f"{drawing.name}, {width} px": draw(page, url, drawing, PICTURES / f"{drawing.name}-{width}.png", width_px=width)
            for drawing in drawings
            for width in (WIDE_PX, NARROW_PX)
        }


@pytest.mark.parametrize("width", [WIDE_PX, NARROW_PX])
@pytest.mark.parametrize("name", CHOSEN)
def test_every_panel_is_drawn_with_data_and_without_complaint(name: str, width: int, found: dict[str, list[str]]) -> None:
    known = {f"{title}: no data" for title in QUIET}
    assert [what for what in found[f"{name}, {width} px"] if what not in known] == []
    assert (PICTURES / f"{name}-{width}.png").stat().st_size > 50_000


def test_faults_are_found_out(found: dict[str, list[str]]) -> None:
    said = "\n".join(found[f"faulty, {WIDE_PX} px"])
    for fault in (
        "faulty 0: unknown unit furlongs",
        "faulty 1: unknown panel type graph",
        "faulty 2: unknown option stack",
        "faulty 2: unknown value all of options.tooltip.mode",
        "faulty 3: no data",
        "faulty 4: Error: unknown variable $unheard",
        "very many words, : cut: ",
        "faulty 6: unknown matcher bySmell",
        "faulty 6: unknown field property shine",
        "faulty 6: unknown colour reddish",
        "board: faulty 6 lies over faulty 7",
    ):
        assert fault in said
