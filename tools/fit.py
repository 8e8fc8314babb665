"""`fxstream fit`: the largest video that fits a memory, or what each budget costs in time.

Every size that is tried is captured and planned, which takes as long as an `inspect` does. What is live grows nearly as
frames and pixels do, so the next size to try is where the line through those tried meets the memory: a few will do.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from textwrap import shorten
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

from fxstream.budget import format_bytes
from fxstream.passes.graph.call import Inputs
from fxstream.passes.stream import stream
from fxstream.tools import picture
from fxstream.tools.errors import UsageError
from fxstream.tools.estimate import estimated_seconds
from fxstream.tools.files import STDOUT, check_writable, named, write
from fxstream.tools.inspection import check_real, planned
from fxstream.tools.measure import measure_peak
from fxstream.tools.progress import progress
from fxstream.tools.targets import Size, Target, load
from fxstream.tools.turns import finish, median_ratio

MOST_FRAMES, MOST_PIXELS = 1024, 8192
"""The largest sizes that are tried."""

POINTS = 6
"""Budgets of the curve between the lowest and the captured graph's peak."""

ROUNDS = 3
"""Timed runs of each plan of the curve."""


@dataclass(frozen=True)
class Probe:
    """One size that was tried: frames, height and width, or those of them that a user's function is given.

    ``total_bytes`` is the lowest that the call reaches, weights and inputs included; None where the model refuses the
    size, for the ``refusal``.
    """

    size: Mapping[str, int]
    weight_bytes: int = 0
    total_bytes: int | None = None
    refusal: str = ""

    @property
    def amount(self) -> int:
        """What the memory grows with."""
        return prod(self.size.values())

    def told(self, memory: int) -> dict[str, Any]:
        fits = self.total_bytes is not None and self.total_bytes <= memory
        return {**self.size, "total_bytes": self.total_bytes, "fits": fits, "refusal": self.refusal}


def run(args: argparse.Namespace) -> int:
    """The command."""
    check_writable({f"--{form}": getattr(args, form) for form in ("json", "csv", "png", "svg")})
    if (args.height is None) != (args.width is None):
        raise UsageError("--height and --width go together")
    if args.frames is not None and args.height is not None:
        return _curve(args)
    for option in ("measure", "png", "svg"):
        if getattr(args, option):
            raise UsageError(f"--{option} is for the curve of budgets; give --frames, --height and --width too")
    if args.memory is None:
        raise UsageError('say what has to fit: --memory, as "8GiB"')
    return _search(args)


def _size(args: argparse.Namespace) -> Size:
    return Size(args.frames, args.height, args.width, args.batch, args.dtype, args.device)


def _load(args: argparse.Namespace, size: Size, fake: bool = True) -> Target:
    return load(args.target, size, component=args.component, small=args.small, fake=fake)


def _search(args: argparse.Namespace) -> int:
    """The most frames at a resolution, or the largest resolution for some frames."""
    size = _size(args)
    target = _load(args, size)
    shape, steps = target.shape, target.steps
    given = {key: value for key, value in size.given().items() if key != "batch"}
    known = given if shape is None else {"frames": shape.frames, "height": shape.height, "width": shape.width}
    find_frames = args.frames is None
    start = {"frames": 1, "height": 512, "width": 512} | known
    del target

    def sizes(number: int) -> dict[str, int]:
        if find_frames:
            return {**known, "frames": 1 + (number - 1) * steps.frames}
        height = max(1, round(number * start["height"] / start["width"])) * steps.pixels
        return {**known, "height": height, "width": number * steps.pixels}

    def probe(number: int) -> Probe:
        tried = sizes(number)
        with progress(f"trying {_told(tried)}", args.quiet):
            return _probe(args, size, tried, is_first=number == first)

    first = (start["frames"] - 1) // steps.frames + 1 if find_frames else max(1, start["width"] // steps.pixels)
    most = MOST_FRAMES // steps.frames if find_frames else MOST_PIXELS // steps.pixels
    best, probes = largest(probe, lambda number: prod(sizes(number).values()), args.memory, min(first, most), most)
    found = sizes(best) if best else None
    shown = [probe.told(args.memory) for probe in sorted(probes, key=lambda probe: probe.amount)]
    result = {"target": args.target, "memory_bytes": args.memory, "largest": found, "tried": shown}
    _write_table(args, result, shown)
    if STDOUT not in (args.json, args.csv):
        print(_tried_table(shown) + "\n")
        if found:
            least = "at least " if best == most else ""
            print(f"{args.target} in {format_bytes(args.memory)}: {least}{_told(found)}.")
    if found is None:
        smallest = min(p.total_bytes for p in probes if p.total_bytes is not None)
        raise UsageError(
            f"nothing fits {format_bytes(args.memory)}: the smallest size tried needs {format_bytes(smallest)}; "
            "give more --memory, or a smaller --height and --width or --frames or --batch"
        )
    return 0


def _told(size: Mapping[str, Any]) -> str:
    """A size in words."""
    parts = [f"{size['frames']} frames"] if size.get("frames") else []
    parts += [f"{size['height']} x {size['width']}"] if size.get("height") else []
    return " of ".join(parts)


def _probe(args: argparse.Namespace, size: Size, tried: dict[str, int], is_first: bool) -> Probe:
    try:
        plan = planned(_load(args, size.replaced(tried)), "min").plan
    except UsageError as error:
        if is_first:
            raise
        return Probe(tried, refusal=str(error))
    held = plan.weight_bytes + plan.input_bytes
    return Probe(tried, plan.weight_bytes, held + plan.after.peak_bytes)


def largest(
    probe: Callable[[int], Probe], amount: Callable[[int], int], memory: int, first: int, most: int
) -> tuple[int, list[Probe]]:
    """The largest number in [1, most] whose probe is within ``memory`` bytes, 0 if none; and what was tried.

    Assumes that memory grows with the number. ``amount`` is what it grows with, nearly in proportion.
    """
    tried: list[Probe] = []
    fits, too_large, number, slow = 0, most + 1, first, 0
    while True:
        before = too_large - fits
        tried.append(probe(number))
        total = tried[-1].total_bytes
        if total is not None and total <= memory:
            fits = number
        else:
            too_large = number
        if too_large - fits <= 1:
            return fits, tried
        # A step or two off the line, as at its end, is usual. After two that told little, halving is quicker.
        slow = slow + 1 if 2 * (too_large - fits) > before else 0
        left = range(fits + 1, too_large)
        if total is None or slow > 2:
            number, slow = left[len(left) // 2], 0
        else:
            number = _where_full(tried, amount, memory, left)


def _where_full(tried: Sequence[Probe], amount: Callable[[int], int], memory: int, left: range) -> int:
    """The last number left that should fit: memory is on a line through the nearest that fits and that doesn't."""
    points = sorted((probe.amount, probe.total_bytes) for probe in tried if probe.total_bytes is not None)
    points = points if len(points) > 1 else [(0, tried[0].weight_bytes), *points]
    above = next((index for index, (_, total) in enumerate(points) if total > memory), len(points) - 1)
    (here, low), (there, high) = points[max(above, 1) - 1 : max(above, 1) + 1]
    if high <= low:
        return left[len(left) // 2]
    full = here + (memory - low) * (there - here) / (high - low)
    below = [number for number in left if amount(number) <= full]
    return below[-1] if below else left[0]


def _tried_table(tried: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            _told(probe),
            format_bytes(probe["total_bytes"]) if probe["total_bytes"] is not None else "",
            "fits" if probe["fits"] else shorten(probe["refusal"], 100) or "does not fit",
        ]
        for probe in tried
    ]
    return tabulate(rows, headers=["size", "lowest peak, weights included", ""])


def _curve(args: argparse.Namespace) -> int:
    """What each budget costs in time."""
    if args.png or args.svg:
        picture.check_available()
    with progress(f"building {args.target}", args.quiet):
        target = _load(args, _size(args), fake=not args.measure)
    points = list(_points(target, args))
    result = {"target": args.target, "memory_bytes": args.memory, "inputs": target.inputs(), "budgets": points}
    _write_table(args, result, points)
    for form in ("png", "svg"):
        if getattr(args, form):
            title = f"{args.target}: {args.frames} frames of {args.height} x {args.width}"
            write(named(getattr(args, form), target.name), picture.curve(points, title, form), args.quiet)
    if STDOUT not in (args.json, args.csv):
        print(_curve_table(points, args.memory))
    return 0


def _points(target: Target, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Plans from the lowest peak to the captured graph's, with what they cost."""
    with progress("capturing, and planning for the lowest peak", args.quiet):
        lowest = planned(target, "min")
    source, before = lowest.captured.graph_module, lowest.plan.before
    held = before.weight_bytes + before.input_bytes
    low, high = lowest.plan.after.peak_bytes, before.peak_bytes
    plans = {low: lowest.graph_module}
    budgets = [int(low * (high / low) ** (step / (POINTS + 1))) for step in range(1, POINTS + 1)]
    if args.memory is not None and low < args.memory - held < high:
        budgets.append(args.memory - held)
    for number, budget in enumerate(sorted(budgets)):
        with progress(f"planning budget {number + 1} of {len(budgets)}", args.quiet):
            streamed = stream(source, budget)
        plans[streamed.after.peak_bytes] = streamed.graph_module
    plans[high] = source
    captured_seconds = estimated_seconds(source)
    by_peak = sorted(plans.items())
    measured = _measured(target, [graph_module for _, graph_module in by_peak], args.quiet) if args.measure else {}
    for number, (peak, graph_module) in enumerate(by_peak):
        yield {
            "peak_bytes": peak,
            "total_bytes": peak + held,
            "loops": sum(node.op == "call_module" for node in graph_module.graph.nodes),
            "estimated_seconds": estimated_seconds(graph_module),
            "estimated_ratio": estimated_seconds(graph_module) / captured_seconds,
            "measured_bytes": None,
            "measured_seconds": None,
            "measured_ratio": None,
            **measured.get(number, {}),
        }


def _measured(target: Target, graph_modules: Sequence[fx.GraphModule], quiet: bool) -> dict[int, dict[str, Any]]:
    """Peaks, and medians over rounds in which each plan runs once; ratios are to the last, the captured graph's."""
    check_real(target)
    tensors = Inputs.of(target.args, target.kwargs).tensors
    seconds: list[list[float]] = [[] for _ in graph_modules]
    with torch.no_grad():
        with progress("measuring peaks", quiet):
            peaks = [measure_peak(graph_module, *tensors).peak_bytes for graph_module in graph_modules]
        for number in range(ROUNDS):
            with progress(f"timing, round {number + 1} of {ROUNDS}", quiet):
                for graph_module, times in zip(graph_modules, seconds, strict=True):
                    began = time.perf_counter()
                    graph_module(*tensors)
                    finish()
                    times.append(time.perf_counter() - began)
    return {
        number: {
            "measured_bytes": peak,
            "measured_seconds": statistics.median(times),
            "measured_ratio": median_ratio(times, seconds[-1]),
        }
        for number, (peak, times) in enumerate(zip(peaks, seconds, strict=True))
    }


def _curve_table(points: Sequence[dict[str, Any]], memory: int | None) -> str:
    headers = ["all", "activation peak", "loops", "estimated time"]
    measured = points[0]["measured_bytes"] is not None
    rows = []
    for point in points:
        row = [format_bytes(point["total_bytes"]), format_bytes(point["peak_bytes"]), point["loops"]]
        row.append(f"{point['estimated_ratio']:.2f}")
        if measured:
            row += [format_bytes(point["measured_bytes"]), f"{point['measured_seconds']:.2f} s"]
            row.append(f"{point['measured_ratio']:.2f}")
        if memory is not None:
            row.append("fits" if point["total_bytes"] <= memory else "does not fit")
        rows.append(row)
    headers += ["measured peak", "time", "measured time"] if measured else []
    headers += [f"in {format_bytes(memory)}"] if memory is not None else []
    table = tabulate(rows, headers=headers, disable_numparse=True, stralign="right")
    return table + "\n\nTimes are over the captured graph's; estimates count memory traffic and launches alone."


def _write_table(args: argparse.Namespace, result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    if args.json:
        write(args.json, json.dumps(result, indent=1) + "\n", args.quiet)
    if args.csv:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(args.csv, out.getvalue(), args.quiet)
