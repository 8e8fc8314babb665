"""Grouping: choose runs, axes and slice counts so that the peak meets a budget at the least estimated time.

The schedule is divided into segments: single nodes, and groups (an interval of a run, looped over slices). What is
live across a segment does not depend on how the others are run, so the peak of each can be told alone and the best
division is a shortest path along the schedule, found from its beginning on, without the segments above the budget. The
lowest reachable budget is the path whose highest segment is lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf

from fxstream.passes.machine.cost import CostModel
from fxstream.passes.planning.candidates import Candidate
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import Run

SLICE_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Slice counts worth a look, besides the most that the cost model allows."""

LOOP_LAUNCHES = 4
"""What a slice costs beside its kernels (windows, stores, the call), in launches."""


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
        self._single = [self._price_whole(index) for index in range(len(program))]
        self._by_end: list[list[Candidate]] = [[] for _ in range(len(program))]
        self._peaks: dict[Candidate, list[tuple[int, float]]] = {}
        self._seconds: dict[tuple[Candidate, int], float] = {}
        self._fixed: dict[Candidate, Group] = {}
        self._beyond: list[int] = []
        for candidate in candidates:
            self._by_end[candidate.end].append(candidate)

    def lowest_bytes(self) -> float:
        """The lowest budget for which ``choose`` finds groups."""
        return self._lowest(lambda candidate: min(peak for _, peak in self._options(candidate)))

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
        """The groups of least estimated time whose peaks are within ``budget`` bytes; None where there are none.

        ``times[end]`` is the least time to come to a position of the schedule, ``last[end]`` the loop that ends there
        then, if it is one and no single node.
        """
        times: list[float] = [0.0]
        last: list[tuple[Candidate, int] | None] = [None]
        for end, live in enumerate(self.program.live_bytes):
            fits = live + self._held(end, end) <= budget
            time, loop = times[end] + self._single[end] if fits else inf, None
            for candidate in self._by_end[end]:
                before = times[candidate.start]
                if before < time:
                    left = budget - self._held(candidate.start, end)
                    seconds, slices = self._fastest(candidate, left, time - before)
                    if slices:
                        time, loop = before + seconds, (candidate, slices)
            times.append(time)
            last.append(loop)
        return None if times[-1] == inf else self._groups(last)

    def _groups(self, last: Sequence[tuple[Candidate, int] | None]) -> list[Group]:
        """The loops on the way back from the end."""
        groups, end = [], len(last) - 1
        while end:
            loop = last[end]
            end = end - 1 if loop is None else loop[0].start
            if loop is not None:
                groups.append(Group(loop[0], self._lengths(*loop)))
        return groups[::-1]

    def learn(self, group: Group, length: int, body_bytes: int) -> None:
        """Take in the exact peak of a body of ``length`` steps."""
        if group.candidate not in self._fixed:
            group.candidate.measured[length] = body_bytes
            self._forget(group.candidate)

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
        return max(self._beyond[start : end + 1], default=0) if self._beyond else 0

    def avoid_larger(self, group: Group) -> None:
        """Let a group write over no input that is larger than its output: what the input holds more lives on."""
        candidate = None if group.candidate in self._fixed else group.candidate.without_larger(self.program)
        if candidate is not None:
            at = self._by_end[candidate.end]
            at[at.index(group.candidate)] = candidate

    def fix(self, group: Group, body_bytes: int) -> None:
        """Add a candidate that may be used just as the group does, its bodies' peak known."""
        candidate = group.candidate
        self._fixed[candidate] = group
        self._by_end[candidate.end].append(candidate)
        self._peaks[candidate] = [(len(group.lengths), candidate.fixed_bytes + body_bytes)]

    def _options(self, candidate: Candidate) -> list[tuple[int, float]]:
        """Slice counts worth a look, fewest first, each with the peak that it makes."""
        if candidate not in self._peaks:
            worth = max(self.costs.most_slices, int(candidate.traffic) // self.costs.least_traffic)
            most = min(candidate.run.steps, worth)
            counts = (*(count for count in SLICE_COUNTS if count < most), most)
            self._peaks[candidate] = [(count, candidate.peak_bytes(count)) for count in counts]
        return self._peaks[candidate]

    def _forget(self, candidate: Candidate) -> None:
        for slices, _ in self._peaks.pop(candidate, ()):
            self._seconds.pop((candidate, slices), None)

    def _fastest(self, candidate: Candidate, left: float, limit: float) -> tuple[float, int]:
        """The least time within ``left`` bytes and its slice count, the most on a tie; none if not below ``limit``."""
        best = limit, 0
        for slices, peak in self._options(candidate):
            if slices * (candidate.launches + LOOP_LAUNCHES) * self.costs.launch > best[0]:
                break  # more slices take more launches still
            if peak <= left:
                seconds = self._price(candidate, slices)
                if seconds < best[0] or (best[1] and seconds == best[0]):
                    best = seconds, slices
        return best

    def _lengths(self, candidate: Candidate, slices: int) -> tuple[int, ...]:
        if candidate in self._fixed:
            return self._fixed[candidate].lengths
        stored = {candidate.run.slices[index].extent for index in candidate.outputs}
        return lengths_of(candidate.run.extent, slices, stored)

    def _price(self, candidate: Candidate, slices: int) -> float:
        key = candidate, slices
        if key not in self._seconds:
            self._seconds[key] = self._estimate(candidate, slices)
        return self._seconds[key]

    def _estimate(self, candidate: Candidate, slices: int) -> float:
        """Seconds that a loop takes."""
        rate, launch = self.costs.rate, self.costs.launch
        working_set = candidate.body_bytes(ceil(candidate.run.extent / slices))
        whole = candidate.whole_traffic * slices * rate(candidate.whole_traffic)
        length = candidate.run.extent // slices
        strided = sum(size * self.costs.stride_factor(run * length) for run, size in candidate.strided.items())
        moved = (candidate.traffic + strided) * rate(working_set)
        flops, again = candidate.overlap
        twice = slices * (flops * self.costs.flop_of(self.program.dtype) + again * rate(working_set))
        slowed = self.costs.slow_flop * sum(flops for steps, flops in candidate.slowed if length < steps)
        return slices * (candidate.launches + LOOP_LAUNCHES) * launch + moved + whole + twice + slowed

    def _traffic(self, index: int) -> tuple[int, int]:
        """Bytes that a node moves: of activations, its workspace twice among them, and of weights."""
        activations, weights = self.program.traffic[index]
        return activations + 2 * self.program.liveness.transient[index], weights

    def _price_whole(self, index: int) -> float:
        """Seconds that a node takes by itself."""
        rate, (traffic, weights) = self.costs.rate, self._traffic(index)
        launches = self.program.launches[index] if traffic else 0
        return self.costs.launch * launches + traffic * rate(traffic) + weights * rate(weights)
