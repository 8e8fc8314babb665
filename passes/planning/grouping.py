"""Grouping: choose runs, axes and slice counts so that the peak meets a budget at the least estimated time.

The schedule is divided into segments: single nodes, and groups (an interval of a run, looped over slices). What is
live across a segment does not depend on how the others are run, so the peak of each can be told alone and the best
division is a shortest path through the schedule, one edge a segment, where edges above the budget are left out. The
lowest reachable budget is the path whose highest edge is lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import networkx as nx

from fxstream.passes.machine.cost import CostModel
from fxstream.passes.planning.candidates import Candidate
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import Run

SLICE_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Slice counts worth a look, besides the most that the cost model allows."""

LOOP_LAUNCHES = 4
"""What a slice costs beside its kernels (windows, stores, the call), in launches."""


class Option(NamedTuple):
    """A candidate with slices of ``lengths``: estimated time and peak."""

    seconds: float
    lengths: tuple[int, ...]
    peak_bytes: float


@dataclass(frozen=True)
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


def lengths_of(extent: int, slices: int, stored: Iterable[int] = ()) -> tuple[int, ...]:
    """``slices`` lengths that sum to ``extent`` and differ by at most one, the longer ones first.

    Fewer where an output, of the extents ``stored``, is so much shorter that a slice would store nothing of it.
    """
    short, longer = divmod(extent, slices)
    lengths = (short + 1,) * longer + (short,) * (slices - longer)
    shorter = [other for other in stored if other < extent]
    return _storing(lengths, extent, shorter) if shorter else lengths


def _storing(lengths: Iterable[int], extent: int, stored: Iterable[int]) -> tuple[int, ...]:
    """The lengths, those that would store nothing of an output put together with the next."""
    ends, end = [0], 0
    for length in lengths:
        end += length
        if all(ends[-1] * other // extent < end * other // extent for other in stored):
            ends.append(end)
    return tuple(after - before for before, after in pairwise(ends))


class Grouping:
    """The segments that a program can be divided into, priced."""

    def __init__(self, program: Program, candidates: Iterable[Candidate], costs: CostModel) -> None:
        self.program, self.costs = program, costs
        self._single = [self._price_whole(*self._traffic(index)) for index in range(len(program))]
        self._by_end: list[list[Candidate]] = [[] for _ in range(len(program))]
        self._options: dict[Candidate, list[Option]] = {}
        self._fixed: set[Group] = set()
        self._beyond: list[int] = []
        for candidate in candidates:
            self._by_end[candidate.end].append(candidate)
            self._weigh(candidate)

    def lowest_bytes(self) -> float:
        """The lowest budget for which ``choose`` finds groups."""
        return self._lowest(lambda candidate: min(option.peak_bytes for option in self._options[candidate]))

    def floor_bytes(self) -> float:
        """The lowest budget that there would be if the inside of loops took nothing."""
        return self._lowest(lambda candidate: candidate.fixed_bytes)

    def _lowest(self, peak_bytes: Callable[[Candidate], float]) -> float:
        best = [0.0]
        for end, live in enumerate(self.program.live_bytes):
            lowest = max(best[end], live + self._held(end, end))
            for candidate in self._by_end[end]:
                before = best[candidate.start]
                if before < lowest:
                    lowest = min(lowest, max(before, peak_bytes(candidate) + self._held(candidate.start, end)))
            best.append(lowest)
        return best[-1]

    def choose(self, budget: float) -> list[Group] | None:
        """The groups of least estimated time whose peaks are within ``budget`` bytes; None where there are none."""
        paths = nx.DiGraph()
        for end, live in enumerate(self.program.live_bytes):
            segments: dict[int, tuple[float, Group | None]] = {}
            if live + self._held(end, end) <= budget:
                segments[end] = (self._single[end], None)
            for candidate in self._by_end[end]:
                left = budget - self._held(candidate.start, end)
                option = next((o for o in self._options[candidate] if o.peak_bytes <= left), None)
                known = segments.get(candidate.start)
                if option is not None and (known is None or option.seconds < known[0]):
                    segments[candidate.start] = (option.seconds, Group(candidate, option.lengths))
            for start, (seconds, group) in segments.items():
                paths.add_edge(start, end + 1, seconds=seconds, group=group)
        try:
            path = nx.shortest_path(paths, 0, len(self.program), weight="seconds")
        except (nx.NetworkXNoPath, nx.NodeNotFound):
            return None
        chosen = (paths.edges[edge]["group"] for edge in pairwise(path))
        return [group for group in chosen if group is not None]

    def learn(self, group: Group, length: int, body_bytes: int) -> None:
        """Take in the exact peak of a body of ``length`` steps."""
        if group not in self._fixed:
            group.candidate.measured[length] = body_bytes
            self._weigh(group.candidate)

    def hold_larger(self, groups: Iterable[Group]) -> bool:
        """Count what these groups' outputs hold beyond their size, in larger inputs; False where that is counted."""
        storages, of = self.program.liveness.storages, self.program.liveness.of
        beyond, taken = [0] * len(self.program), dict[int, int]()
        for group in groups:
            for index, source in group.candidate.over.items():
                made = of[self.program.values[index].node]
                held = max(taken.get(storage, storages[storage].bytes) for storage in of[source])
                taken |= dict.fromkeys(made, held)
                death = max(storages[storage].death for storage in made)
                for at in range(group.end + 1, min(death + 1, len(beyond))):
                    beyond[at] += held - sum(storages[storage].bytes for storage in made)
        known, self._beyond = self._beyond, beyond if any(beyond) else []
        return known != self._beyond

    def _held(self, start: int, end: int) -> int:
        """Bytes that outputs of groups hold beyond their size at one of these positions."""
        return max(self._beyond[start : end + 1], default=0)

    def avoid_larger(self, group: Group) -> None:
        """Let a group write over no input that is larger than its output: what the input holds more lives on."""
        candidate = None if group in self._fixed else group.candidate.without_larger(self.program)
        if candidate is not None:
            at = self._by_end[candidate.end]
            at[at.index(group.candidate)] = candidate
            self._weigh(candidate)

    def fix(self, group: Group, body_bytes: int) -> None:
        """Add a candidate that may be used just as the group does, its bodies' peak known."""
        candidate, slices = group.candidate, len(group.lengths)
        self._fixed.add(group)
        self._by_end[candidate.end].append(candidate)
        peak = candidate.fixed_bytes + body_bytes
        self._options[candidate] = [Option(self._price(candidate, slices), group.lengths, peak)]

    def _weigh(self, candidate: Candidate) -> None:
        worth = max(self.costs.most_slices, int(candidate.traffic) // self.costs.least_traffic)
        most = min(candidate.run.steps, worth)
        counts = (*(count for count in SLICE_COUNTS if count < most), most)
        run = candidate.run
        stored = {run.slices[index].extent for index in candidate.outputs}
        options = [
            Option(self._price(candidate, n), lengths_of(run.extent, n, stored), candidate.peak_bytes(n))
            for n in counts
        ]
        self._options[candidate] = sorted(options)

    def _price(self, candidate: Candidate, slices: int) -> float:
        rate, launch = self.costs.rate, self.costs.launch
        working_set = candidate.body_bytes(ceil(candidate.run.extent / slices))
        whole = candidate.whole_traffic * slices * rate(candidate.whole_traffic)
        length = candidate.run.extent // slices
        strided = sum(size * self.costs.stride_factor(run * length) for run, size in candidate.strided.items())
        moved = (candidate.traffic + strided) * rate(working_set)
        flops, again = candidate.overlap
        twice = slices * (flops * self.costs.flop + again * rate(working_set))
        slowed = self.costs.slow_flop * sum(flops for steps, flops in candidate.slowed if length < steps)
        return slices * (candidate.launches + LOOP_LAUNCHES) * launch + moved + whole + twice + slowed

    def _traffic(self, index: int) -> tuple[int, int]:
        """Bytes that a node moves: of activations, its workspace twice among them, and of weights."""
        activations, weights = self.program.traffic[index]
        return activations + 2 * self.program.liveness.transient[index], weights

    def _price_whole(self, traffic: int, weights: int) -> float:
        rate = self.costs.rate
        return self.costs.launch * bool(traffic) + traffic * rate(traffic) + weights * rate(weights)
