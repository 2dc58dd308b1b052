"""A small chart as SVG text: step lines over a day, with one background area. No library, so that a script can make it anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["Series", "draw_steps"]

_WIDTH, _HEIGHT = 960, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 60, 36
_FONT = 'font-family="sans-serif" font-size="12" fill="#333"'


@dataclass(frozen=True)
class Series:
    name: str
    color: str
    values: Sequence[float]


def draw_steps(title: str, series: Sequence[Series], *, background: tuple[str, Sequence[float]], hours: float, most: float) -> str:
    """Lines from 0 to `most`, over `hours`; the background is scaled to its own largest value, which its legend names."""
    label, area = background
    peak = max(area) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" {_FONT} font-weight="bold">{escape(title)}</text>',
        f'<path d="{_area([value / peak * most for value in area], most)}" fill="#e8e4d8"/>',
        *_axes(hours, most),
        *(f'<path d="{_line(item.values, most)}" fill="none" stroke="{item.color}" stroke-width="1.6"/>' for item in series),
    ]
    entries = [("#e8e4d8", f"{label} (peak {peak:.0f})"), *((item.color, item.name) for item in series)]
    for index, (color, name) in enumerate(entries):
        x = _LEFT + index * 220
        parts.append(f'<rect x="{x}" y="32" width="14" height="10" fill="{color}"/><text x="{x + 20}" y="42" {_FONT}>{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(hours: float, most: float) -> list[str]:
    lines = []
    for value in range(int(most) + 1):
        y = _y(value, most)
        lines.append(f'<path d="M{_LEFT} {y}H{_WIDTH - _RIGHT}" stroke="#ccc" stroke-width="0.5"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4}" {_FONT} text-anchor="end">{value}</text>')
    for hour in range(0, int(hours) + 1, max(1, int(hours) // 12)):
        x = _LEFT + hour / hours * (_WIDTH - _LEFT - _RIGHT)
        lines.append(f'<text x="{x:.0f}" y="{_HEIGHT - 12}" {_FONT} text-anchor="middle">{hour}:00</text>')
    return lines


def _line(values: Sequence[float], most: float) -> str:
    """Steps, of which only the changes are written."""
    path, last = [], None
    for index, value in enumerate(values):
        if last is None:
            path.append(f"M{_x(index, len(values))} {_y(value, most)}")
        elif value != last:
            path.append(f"H{_x(index, len(values))}V{_y(value, most)}")
        last = value
    return "".join([*path, f"H{_WIDTH - _RIGHT}"])


def _area(values: Sequence[float], most: float) -> str:
    points = "".join(f"L{_x(index, len(values))} {_y(value, most)}" for index, value in enumerate(values))
    return f"M{_LEFT} {_y(0, most)}{points}L{_WIDTH - _RIGHT} {_y(0, most)}Z"


def _x(index: int, count: int) -> float:
    return round(_LEFT + index / max(1, count - 1) * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(value: float, most: float) -> float:
    return round(_HEIGHT - _BOTTOM - value / most * (_HEIGHT - _TOP - _BOTTOM), 1)
