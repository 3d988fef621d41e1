"""A bar chart as SVG: medians as bars, ranges as whiskers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from summary import Spread

WIDTH, LEFT, RIGHT, EDGE = 880, 262, 96, 24
"""Of the whole chart, of what is left of the bars and right of them, and of the empty edge, in pixels."""
HEADER, HEADING, ROW, BAR, AXIS = 84, 34, 28, 16, 34
"""Heights: of the title, of a panel's heading, of a row, of its bar, and of the axis below a panel, in pixels."""
INK, QUIET, GRID, OURS, THEIRS = "#1f2933", "#616e7c", "#e4e7eb", "#0b7a75", "#a9b8c6"
FONT = "-apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row of a chart."""

    label: str
    spread: Spread
    ours: bool


def bar_chart(title: str, notes: Sequence[str], panels: Mapping[str, Sequence[Bar]]) -> str:
    """Draw panels of horizontal bars over one scale.

    Args:
        title: What is shown, with its unit.
        notes: Up to two lines below the title.
        panels: Rows by the heading of their panel.

    Returns:
        The text of an SVG file.
    """
    step, end = axis_of(max(bar.spread.most for bars in panels.values() for bar in bars))
    scale = (WIDTH - LEFT - RIGHT) / end
    parts = [_text(EDGE, 34, title, size=19, weight=600)]
    parts += [_text(EDGE, 56 + 18 * line, note, size=12.5, fill=QUIET) for line, note in enumerate(notes)]
    top = float(HEADER)
    for heading, bars in panels.items():
        parts.append(_text(EDGE, top + 22, heading, size=14, weight=600))
        top += HEADING
        bottom = top + ROW * len(bars)
        for tick in range(round(end / step) + 1):
            x = LEFT + tick * step * scale
            parts.append(f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" stroke="{GRID}"/>')
            parts.append(_text(x, bottom + 16, f"{tick * step:,.0f}", size=11, fill=QUIET, anchor="middle"))
        for row, bar in enumerate(bars):
            parts += _draw_bar(bar, top + row * ROW + ROW / 2, scale)
        top = bottom + AXIS
    height = top + 4
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" font-family="{FONT}" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" fill="#fff" stroke="{GRID}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def axis_of(most: float) -> tuple[float, float]:
    """Choose a round step between at most seven ticks, and where the last of them is: at `most` or above."""
    power = 10.0 ** math.floor(math.log10(most / 6))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if most / (factor * power) <= 6)
    return step, math.ceil(most / step) * step


def _draw_bar(bar: Bar, middle: float, scale: float) -> list[str]:
    least, median, most = (LEFT + value * scale for value in (bar.spread.least, bar.spread.median, bar.spread.most))
    fill, weight = (OURS, 600) if bar.ours else (THEIRS, 400)
    whisker = (
        f"M{least:.1f} {middle:.1f}H{most:.1f}"
        f"M{least:.1f} {middle - 4:.1f}V{middle + 4:.1f}M{most:.1f} {middle - 4:.1f}V{middle + 4:.1f}"
    )
    return [
        _text(LEFT - 10, middle + 4.5, bar.label, size=13, weight=weight, anchor="end"),
        f'<rect x="{LEFT}" y="{middle - BAR / 2:.1f}" width="{median - LEFT:.1f}" height="{BAR}" rx="2" '
        f'fill="{fill}"/>',
        f'<path d="{whisker}" stroke="{INK}" stroke-width="1.4" fill="none"/>',
        _text(max(median, most) + 9, middle + 4.5, f"{bar.spread.median:,.0f}", size=13, weight=weight, halo=True),
    ]


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: float,
    weight: int = 400,
    fill: str = INK,
    anchor: str = "start",
    halo: bool = False,
) -> str:
    around = ' stroke="#fff" stroke-width="5" paint-order="stroke"' if halo else ""  # keeps lines out of figures
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}"{around}>{escape(words)}</text>'
    )
