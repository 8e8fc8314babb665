"""Pictures, by matplotlib: the memory timeline of a plan, and the curve of a budget.

Blue and vermilion are told apart with any kind of colour vision; nothing is told by colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fxstream.budget import format_bytes
from fxstream.notebook import COLOURS
from fxstream.tools.chart import UNITS
from fxstream.tools.document import Document
from fxstream.tools.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

(BEFORE, AFTER), GROUP = COLOURS, "#6b6b6b"


def check_available() -> None:
    """Raises ``UsageError`` where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise UsageError("a picture needs matplotlib: pip install 'fxstream[plot]'")


def timeline(found: Document, form: str) -> bytes:
    """Bytes live along the schedule, before and after, on one scale; peaks and loops are marked."""
    figure = _figure(10, 6)
    upper, lower = figure.subplots(2, 1, sharey=True)
    size, unit = _scale(found["before"]["peak_bytes"])
    _schedule(upper, found, "before", "Before: as captured", BEFORE, size, unit)
    _schedule(lower, found, "after", "After: streamed", AFTER, size, unit)
    figure.suptitle(f"{found['target']}, activations", x=0.01, ha="left")
    return _saved(figure, form)


def curve(points: Sequence[dict[str, Any]], title: str, form: str) -> bytes:
    """Peak against time: estimated, and measured where it was."""
    figure = _figure(8, 5)
    axes = figure.subplots()
    size, unit = _scale(max(point["total_bytes"] for point in points))
    peaks = [point["total_bytes"] / size for point in points]
    for key, label, colour, marker, line in (
        ("estimated_ratio", "estimated (memory traffic and launches)", AFTER, "o", "-"),
        ("measured_ratio", "measured", BEFORE, "s", "--"),
    ):
        if all(point[key] is not None for point in points):
            axes.plot(peaks, [point[key] for point in points], line, color=colour, marker=marker, label=label)
    axes.set(title=title, xlabel=f"weights, inputs and activations, {unit}", ylabel="time over the captured graph's")
    axes.grid(alpha=0.3)
    axes.legend()
    return _saved(figure, form)


def _schedule(axes: Axes, found: Document, which: str, title: str, colour: str, size: int, unit: str) -> None:
    profile = found[which]
    live = [node["live_bytes"] / size for node in profile["nodes"]]
    axes.stairs(live, fill=True, color=colour)
    peak, at = profile["peak_bytes"], profile["peak_index"]
    axes.plot(at + 0.5, peak / size, "v", color="black", markersize=7)
    right = at > 0.6 * len(live)
    note = f"{format_bytes(peak)} at {profile['nodes'][at]['name']}" if live else ""
    axes.annotate(
        note,
        (at + 0.5, peak / size),
        xytext=(-8 if right else 8, 4),
        textcoords="offset points",
        ha="right" if right else "left",
    )
    index = {node["name"]: position for position, node in enumerate(profile["nodes"])}
    for group in found["groups"]:
        low = -0.03 * (1.6 * group["depth"] + 1.6)
        for first, last in _spans(group, which, index):
            axes.add_patch(_bar(first, last, low, axes))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlim=(0, max(len(live), 1)), ylabel=unit)
    axes.margins(y=0.12)
    axes.set_xlabel(f"{len(live)} operators in the order that they run; bars below: loops", fontsize=8, labelpad=10)
    depths = 1 + max((group["depth"] for group in found["groups"]), default=-1)
    axes.tick_params(axis="x", pad=4 + 9 * depths, length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _spans(group: dict[str, Any], which: str, index: dict[str, int]) -> list[tuple[int, int]]:
    """The first and last positions of a loop's parts in a schedule."""
    if which == "before":
        return group["spans"]
    if group["name"] in index:
        return [(index[group["name"]], index[group["name"]])]
    inside = [position for name, position in index.items() if name.startswith(group["name"] + "/")]
    return [(inside[0], inside[-1])] if inside else []


def _bar(first: int, last: int, low: float, axes: Axes) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (first + 0.1, low),
        last - first + 0.8,
        0.03,
        transform=axes.get_xaxis_transform(),
        color=GROUP,
        linewidth=0,
        clip_on=False,
    )


def _scale(largest: int) -> tuple[int, str]:
    unit, size = next(((unit, size) for unit, size in UNITS if largest >= size), ("B", 1))
    return size, unit


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Figure, form: str) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None  # the same plan gives the same file
    figure.savefig(out, format=form, dpi=150, metadata=metadata)
    return out.getvalue()
