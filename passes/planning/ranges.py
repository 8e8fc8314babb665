"""Ranges: what each node of a loop's body computes for one slice, inferred from what is stored of it, back.

A node is computed as far as all that read it want it; where an operator reads beyond its own slice, that is more than
the slice, and neighbouring slices compute it twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxstream.passes.operators.axes import Slice, Span
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import Run

LoopInput = tuple[fx.Node, "Slice | None"]


@dataclass(frozen=True)
class Ranges:
    """For one slice: the steps wanted of each node of the body, by position, and read of each sliced input."""

    wanted: dict[int, Span]
    read: dict[LoopInput, Span]


def stored_part(piece: Slice, extent: int, part: Span) -> Span:
    """The part of an output's axis that belongs to a part of the loop's, whose extent may be another."""
    return part[0] * piece.extent // extent, part[1] * piece.extent // extent


def infer_ranges(program: Program, run: Run, body: Sequence[int], outputs: Sequence[int], part: Span) -> Ranges:
    """The ranges of the slice that stores the ``part`` of each of ``outputs``."""
    inside = set(body)
    wanted: dict[int, Span] = {index: stored_part(run.slices[index], run.extent, part) for index in outputs}
    read: dict[LoopInput, Span] = {}
    for index in reversed(body):
        if index not in wanted:
            continue
        cut = run.cuts[index]
        window = cut.window(wanted[index])
        for node, piece in zip(program.values[index].reads, cut.inputs, strict=True):
            at = program.position.get(node, -1)
            if piece is None:
                continue
            if at in inside:
                wanted[at] = _hull(wanted, at, window)
            else:
                read[node, piece] = _hull(read, (node, piece), window)
    return Ranges(wanted, read)


def _hull(spans: Mapping[Any, Span], key: Any, span: Span) -> Span:
    low, high = spans.get(key, span)
    return min(low, span[0]), max(high, span[1])
