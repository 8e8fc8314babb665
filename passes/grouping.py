"""Grouping: choose runs, axes and slice counts so that the peak meets a budget at the least estimated time.

The schedule is divided into segments: single nodes, and groups (an interval of a run, looped over slices). What is
live across a segment does not depend on how the others are run, so the peak of each can be told alone and the best
division is a shortest path through the schedule, one edge a segment, where edges above the budget are left out. The
lowest reachable budget is the path whose highest edge is lowest.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil

import torch
from torch import fx

from fxstream.loop import Slice
from fxstream.passes.cost import CostModel
from fxstream.passes.layout import slice_layout
from fxstream.passes.liveness import storages_of
from fxstream.passes.program import Program
from fxstream.passes.runs import Run

MOST_CUTS = 12
"""Ends of a run that are considered as first and as last nodes of a group: those with the fewest bytes live there."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """An interval [start, end] of a run as a loop, before its slice count is chosen.

    Its peak is ``fixed_bytes`` plus ``step_bytes`` for each step of the axis in a slice. ``launches`` is nodes a
    slice, ``traffic`` bytes moved over all slices, ``weight_traffic`` bytes read again by each.
    """

    run: Run
    start: int
    end: int
    fixed_bytes: int
    step_bytes: float
    launches: int
    traffic: float
    weight_traffic: float
    measured: dict[int, int] = field(default_factory=dict)

    def body_bytes(self, length: int) -> float:
        """Peak bytes inside a body of ``length`` steps: exact where it was built, else by the nearest that was."""
        if length in self.measured or not self.measured:
            return self.measured.get(length, self.step_bytes * length)
        known = min(self.measured, key=lambda other: abs(other - length))
        return self.measured[known] * max(1.0, length / known) if length > known else self.measured[known]

    def peak_bytes(self, slices: int) -> float:
        return self.fixed_bytes + self.body_bytes(ceil(self.run.extent / slices))


@dataclass(frozen=True, eq=False)
class Group:
    """A run's interval [start, end] of the schedule, to be run as a loop over slices of ``lengths`` steps."""

    candidate: Candidate
    lengths: tuple[int, ...]

    @property
    def run(self) -> Run:
        return self.candidate.run

    @property
    def start(self) -> int:
        return self.candidate.start

    @property
    def end(self) -> int:
        return self.candidate.end


def lengths_of(extent: int, slices: int) -> tuple[int, ...]:
    """``slices`` lengths that sum to ``extent`` and differ by at most one, the longer ones first."""
    short, longer = divmod(extent, slices)
    return (short + 1,) * longer + (short,) * (slices - longer)


class Grouping:
    """The segments that a program can be divided into, priced."""

    def __init__(self, program: Program, runs: Sequence[Run], costs: CostModel) -> None:
        self.program, self.costs = program, costs
        self.by_end: list[list[Candidate]] = [[] for _ in range(len(program))]
        self._traffic = [_traffic(program, index) for index in range(len(program))]
        for run in runs:
            for candidate in self._candidates(run):
                self.by_end[candidate.end].append(candidate)
        self._single = [
            costs.launch * bool(traffic) + traffic * costs.rate(traffic) + weights * costs.rate(weights)
            for traffic, weights in self._traffic
        ]

    def lowest_bytes(self) -> float:
        """The lowest budget for which ``choose`` finds groups."""
        best = [0.0]
        for end, live in enumerate(self.program.live_bytes):
            peaks = [max(best[end], live)]
            for candidate in self.by_end[end]:
                most = min(candidate.run.extent, self.costs.most_slices)
                peaks.append(max(best[candidate.start], candidate.peak_bytes(most)))
            best.append(min(peaks))
        return best[-1]

    def choose(self, budget: float) -> list[Group] | None:
        """The groups of least estimated time whose peaks are within ``budget`` bytes; None where there are none."""
        infinite = float("inf")
        cost = [0.0]
        step: list[tuple[int, Candidate | None, int]] = []
        for end, live in enumerate(self.program.live_bytes):
            best = cost[end] + self._single[end] if live <= budget else infinite
            how: tuple[int, Candidate | None, int] = (end, None, 1)
            for candidate in self.by_end[end]:
                before = cost[candidate.start]
                if before < best:
                    slices, price = self._slices(candidate, budget)
                    if before + price < best:
                        best, how = before + price, (candidate.start, candidate, slices)
            cost.append(best)
            step.append(how)
        if cost[-1] == infinite:
            return None
        groups, at = [], len(step)
        while at:
            start, candidate, slices = step[at - 1]
            if candidate is not None:
                lengths = lengths_of(candidate.run.extent, slices)
                groups.append(Group(candidate, lengths))
            at = start
        return groups[::-1]

    def _slices(self, candidate: Candidate, budget: float) -> tuple[int, float]:
        """The cheapest slice count within the budget, and its estimated seconds."""
        if candidate.fixed_bytes > budget:
            return 1, float("inf")
        most = min(candidate.run.extent, self.costs.most_slices)
        prices = [
            (self._price(candidate, slices), slices)
            for slices in self._counts(most)
            if candidate.peak_bytes(slices) <= budget
        ]
        price, slices = min(prices, default=(float("inf"), 1))
        return slices, price

    @staticmethod
    @cache
    def _counts(most: int) -> tuple[int, ...]:
        """Slice counts worth a look, up to ``most``: a few a doubling."""
        few = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
        return (*(count for count in few if count < most), most)

    def _price(self, candidate: Candidate, slices: int) -> float:
        working_set = candidate.step_bytes * ceil(candidate.run.extent / slices)
        weights = candidate.weight_traffic * slices * self.costs.rate(candidate.weight_traffic)
        return (
            slices * candidate.launches * self.costs.launch
            + candidate.traffic * self.costs.rate(working_set)
            + weights
        )

    def whole(self, run: Run) -> Candidate:
        """A run from end to end."""
        return list(_sweep(self.program, run, run.start, {run.end}, self._traffic))[-1]

    def _candidates(self, run: Run) -> Iterator[Candidate]:
        cuts = self.program.cut_bytes
        inside = [index for index in run.slices if run.start <= index <= run.end]
        starts = {run.start, *heapq.nsmallest(MOST_CUTS, inside, key=lambda index: cuts[index])}
        ends = {run.end, *heapq.nsmallest(MOST_CUTS, inside, key=lambda index: cuts[index + 1])}
        for start in sorted(starts):
            yield from _sweep(self.program, run, start, ends, self._traffic)


def _sweep(
    program: Program, run: Run, start: int, ends: set[int], traffic: Sequence[tuple[int, int]]
) -> Iterator[Candidate]:
    """The candidates that begin at ``start``: one pass over the run, its memory kept along the way."""
    storages, extent = program.liveness.storages, run.extent
    held = program.cut_bytes[start]  # what was live before: inputs of the group, and what lives across it
    hoisted = 0  # whole values of the group
    hoisting = 0  # the peak while they are computed
    body = 0.0  # bytes a step of the axis, live in the body at this node
    peak = 0.0
    outputs = 0  # bytes of what the body makes that outlives this node
    launches, moved, weights = 0, 0.0, 0.0
    windows: dict[tuple[fx.Node, Slice], int] = {}
    sliced = set()
    expiring: dict[int, float] = {}
    for index in range(start, run.end + 1):
        made = program.born[index]
        size = sum(storages[s].bytes for s in made)
        transient = program.liveness.transient[index]
        if index not in run.slices:
            hoisted += size
            hoisting = max(hoisting, hoisted + transient)
            hoisted -= sum(storages[s].bytes for s in made if storages[s].death == index)
            continue
        sliced.update(made)
        outputs += size
        body += size / extent
        for node, piece in zip(program.values[index].reads, run.cuts[index].inputs, strict=True):
            at = program.position.get(node, -1)
            if piece is None or (at >= start and at in run.slices):
                continue
            if (node, piece) not in windows:
                windows[node, piece] = index
                launches += 1
                value = node.meta["val"]
                if not isinstance(value, torch.Tensor):
                    return  # one of several results: the loop has to begin before the call that makes them
                if piece.outer > 1:
                    copied = value.numel() * value.element_size() / extent
                    last = max(program.position.get(user, 0) for user in node.users if _within(program, user, run))
                    body += copied
                    expiring[last] = expiring.get(last, 0.0) + copied
                    moved += 2 * copied * extent
        peak = max(peak, body + transient / extent)
        dying = sum(s.bytes for s in (storages[i] for i in made) if s.death == index)
        outputs -= dying
        body -= dying / extent + expiring.pop(index, 0.0)
        for node in program.values[index].reads:
            for storage in program.liveness.of.get(node, ()):
                if storage in sliced and storages[storage].death == index and storages[storage].birth != index:
                    outputs -= storages[storage].bytes
                    body -= storages[storage].bytes / extent
                    sliced.discard(storage)
        if size or transient:
            launches += 1
            moved += traffic[index][0]
            weights += traffic[index][1]
        if index in ends and index > start and outputs > 0:
            new = outputs - sum(size for size, _ in overwrites(program, run, start, index).values())
            fixed = held + max(hoisting, hoisted + new)
            yield Candidate(run, start, index, fixed, peak, launches, moved + outputs, weights)


def _within(program: Program, node: fx.Node, run: Run) -> bool:
    return program.position.get(node, -1) in run.slices


def group_outputs(program: Program, run: Run, start: int, end: int) -> list[int]:
    """Positions in the group whose storages outlive it: the loop's outputs."""
    storages = program.liveness.storages
    return [
        index
        for index in range(start, end + 1)
        if index in run.slices and any(storages[s].death > end for s in program.born[index])
    ]


def overwrites(program: Program, run: Run, start: int, end: int) -> dict[int, tuple[int, fx.Node]]:
    """Outputs of the group that can be written over one of its dying inputs: position -> (bytes, the input).

    Legal where the input's storage was made by the graph, dies in the group, and every slice of the body reads of it
    just the bytes that the output's slice is written to.
    """
    liveness = program.liveness
    outputs = group_outputs(program, run, start, end)
    if not outputs:
        return {}
    reads: dict[int, list[tuple[fx.Node, Slice | None]]] = {}
    for index in range(start, end + 1):
        if index not in run.slices:
            continue
        for node, piece in zip(program.values[index].reads, run.cuts[index].inputs, strict=True):
            at = program.position.get(node, -1)
            if at >= 0 and (at < start or at not in run.slices):
                for storage in liveness.of[node]:
                    if liveness.storages[storage].death <= end:
                        reads.setdefault(storage, []).append((node, piece))
    found: dict[int, tuple[int, fx.Node]] = {}
    taken = set()
    for index in outputs:
        value = program.values[index].node.meta["val"]
        if not isinstance(value, torch.Tensor):
            continue
        layout = slice_layout(value, run.slices[index])
        size = value.untyped_storage().nbytes()
        for storage, edges in reads.items():
            node = edges[0][0]
            if storage in taken or liveness.storages[storage].bytes != size or layout is None:
                continue
            same = all(p is not None and slice_layout(n.meta["val"], p) == layout for n, p in edges)
            if same and len(list(storages_of(node.meta["val"]))) == 1:
                found[index] = (size, node)
                taken.add(storage)
                break
    return found


def _traffic(program: Program, index: int) -> tuple[int, int]:
    """Bytes that a node reads and writes: activations, and weights."""
    value = program.values[index]
    if program.is_view(index):
        return 0, 0
    activations = sum(program.liveness.storages[s].bytes for s in program.born[index])
    weights = 0
    for node, tensor in zip(value.reads, value.call.tensors, strict=False):
        size = tensor.numel() * tensor.element_size()
        if node.op == "get_attr":
            weights += size
        else:
            activations += size
    return activations, weights
