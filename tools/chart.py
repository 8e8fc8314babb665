"""Memory along a schedule, as a chart of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = " ▁▂▃▄▅▆▇█"
"""A cell filled by none to eight of its eighths."""

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
LABEL_EVERY = 3


def memory_chart(live_bytes: Sequence[int], *, width: int = 72, height: int = 12, top_bytes: int | None = None) -> str:
    """A chart of ``live_bytes``, one value an operator in the order that they run.

    ``width`` counts the characters of a line, labels included, ``height`` the lines above the axis. Where there are
    more operators than columns, a column shows the most that is live in its part of the schedule. ``top_bytes`` is the
    upper end of the scale, the largest value if None: give one to two charts to compare them.
    """
    top = max(top_bytes or max(live_bytes, default=0), 1)
    unit, size = next((unit, size) for unit, size in UNITS if top >= size)
    labels = {row: f"{top * row / height / size:.2f} {unit}" for row in range(height, 0, -LABEL_EVERY)} | {0: "0"}
    margin = max(map(len, labels.values()))
    columns = _columns(live_bytes, width - margin - 2)
    eighths = [min(-(-8 * height * value // top), 8 * height) for value in columns]  # rounded up: little is not nothing
    lines = []
    for row in range(height, 0, -1):
        cells = (BLOCKS[min(max(filled - 8 * (row - 1), 0), 8)] for filled in eighths)
        lines.append(f"{labels.get(row, ''):>{margin}} {'┤' if row in labels else '│'}{''.join(cells)}".rstrip())
    lines.append(f"{labels[0]:>{margin}} └" + "─" * len(columns))
    lines.append(" " * (margin + 2) + f"1{len(live_bytes):>{len(columns) - 1}}")
    return "\n".join(lines)


def _columns(live_bytes: Sequence[int], count: int) -> list[int]:
    """The most of each of ``count`` equal parts; fewer values than parts are repeated."""
    total = len(live_bytes)
    starts = [column * total // count for column in range(count + 1)]
    return [max(live_bytes[a : max(b, a + 1)], default=0) for a, b in pairwise(starts)]
