"""What a notebook shows of a plan: a picture of memory along the schedule, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fxstream.budget import format_bytes

WIDTH, HEIGHT, MARGIN = 720, 120, 70
COLOURS = ("#d55e00", "#0072b2")
"""Of before and after: vermilion and blue, told apart with any kind of colour vision."""


def timeline(curves: Mapping[str, Sequence[int]]) -> str:
    """Bytes live along some schedules, one below the other on one scale, as SVG."""
    top = max((max(live, default=0) for live in curves.values()), default=0) or 1
    parts = []
    for row, ((name, live), colour) in enumerate(zip(curves.items(), COLOURS, strict=False)):
        down = row * (HEIGHT + 30) + 20
        step = WIDTH / max(1, len(live))
        points = [(MARGIN + index * step, down + HEIGHT * (1 - size / top)) for index, size in _highest(live)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        ground = f"{MARGIN + WIDTH},{down + HEIGHT} {MARGIN},{down + HEIGHT}"
        parts.append(
            f'<text x="{MARGIN}" y="{down - 6}">{escape(name)}: {format_bytes(max(live, default=0))}</text>'
            f'<polygon points="{line} {ground}" fill="{colour}" fill-opacity="0.25" stroke="{colour}"/>'
            f'<text x="{MARGIN - 6}" y="{down + 10}" text-anchor="end">{format_bytes(top)}</text>'
            f'<text x="{MARGIN - 6}" y="{down + HEIGHT}" text-anchor="end">0</text>'
        )
    size = f'width="{MARGIN + WIDTH + 10}" height="{len(curves) * (HEIGHT + 30) + 10}"'
    style = 'font-family="sans-serif" font-size="11" fill="currentColor"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {style}>{"".join(parts)}</svg>'


def _highest(live: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Positions and bytes, of long schedules the most of each stretch that falls on one pixel."""
    stretch = max(1, len(live) // WIDTH)
    return ((start, max(live[start : start + stretch])) for start in range(0, len(live), stretch))


def blocks(texts: Iterable[str]) -> str:
    """Tables as they are printed, one below the other."""
    return "".join(f"<pre>{escape(text)}</pre>" for text in texts)
