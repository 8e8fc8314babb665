"""Candidates: intervals of a run as loops, with what they hold in memory and what they move.

All candidates of a run that begin at one node are found in one sweep over the run, its liveness kept along the way.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch
from torch import fx

from fxstream.passes.graph.liveness import bytes_of
from fxstream.passes.operators.layout import lies_behind, lies_within, offset_bytes
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.ranges import infer_ranges, stored_part
from fxstream.passes.planning.runs import Run
from fxstream.runtime.loop import Slice, Stretches

MOST_CUTS = 8
"""Ends of a run that are considered as first and as last nodes of a group: those with the fewest bytes live there."""

LONGEST_HILL = 100
"""Nodes of a hill, at most: the edges of longer ones are among the cuts with the fewest bytes."""

BETWEEN = 8
"""Slices of one step, in the middle of an axis, for which it is seen what they read: windows may be aligned to more."""

LEAST_HILL = 0.02
"""A hill rises above its edges by at least this share of the peak."""


@dataclass(eq=False)
class Candidate:
    """An interval [start, end] of a run as a loop, before its slice count is chosen.

    Its peak is ``fixed_bytes`` plus what a body holds: by estimate the most of ``moments``, pairs of bytes that any
    slice holds and bytes for each step of the axis in it; ``measured`` has the exact bytes of the bodies that were
    built, by their length. ``halo`` is the steps that the first nodes compute beyond a slice, ``overlap`` the
    (operations, bytes moved) that all nodes do for nothing in each; ``slowed`` are pairs of steps and operations, that
    run in a slower kernel in slices of fewer steps. ``launches`` is kernels a slice, ``traffic`` bytes
    moved over all slices, ``whole_traffic`` bytes of whole tensors, weights mostly, read again by each. ``strided``
    maps the contiguous bytes that one step has in a window or an output to the bytes moved in such pieces. ``outputs``
    are the positions whose storages outlive the loop; ``over`` maps those written over a dying input to that input.
    ``mapped`` are the windows of values in files that a slice has in memory, by their pages.
    """

    run: Run
    start: int
    end: int
    fixed_bytes: int
    moments: tuple[tuple[float, float], ...]
    launches: int
    traffic: float
    whole_traffic: float
    strided: dict[int, int]
    outputs: tuple[int, ...]
    over: dict[int, fx.Node]
    halo: float = 0.0
    overlap: tuple[float, float] = (0.0, 0.0)
    slowed: tuple[tuple[float, int], ...] = ()
    mapped: tuple[Stretches, ...] = ()
    measured: dict[int, int] = field(default_factory=dict)

    def body_bytes(self, length: int) -> float:
        """Peak bytes inside a body of ``length`` steps: exact where it was built, else by the nearest that was."""
        steps = min(length + self.halo, self.run.extent)
        mapped = sum(window.bytes_in_pages(steps) for window in self.mapped)
        if length in self.measured or not self.measured:
            return mapped + (self.measured.get(length) or max(fixed + step * steps for fixed, step in self.moments))
        known = min(self.measured, key=lambda other: abs(other - length))
        return mapped + self.measured[known] * max(1.0, (length + self.halo) / (known + self.halo))

    def without_larger(self, program: Program) -> Candidate | None:
        """The candidate with no output over an input larger than it; None where it has none such."""
        values = {index: program.values[index].node.meta["val"] for index in self.over}
        sizes = {index: value.untyped_storage().nbytes() for index, value in values.items()}
        larger = {index for index, node in self.over.items() if bytes_of(node.meta["val"]) > sizes[index]}
        if not larger:
            return None
        over = {index: node for index, node in self.over.items() if index not in larger}
        return replace(
            self, fixed_bytes=self.fixed_bytes + sum(sizes[index] for index in larger), over=over, measured={}
        )

    def peak_bytes(self, slices: int) -> float:
        return self.fixed_bytes + self.body_bytes(ceil(self.run.extent / slices))


def find_candidates(program: Program, runs: Iterable[Run]) -> Iterator[Candidate]:
    """The intervals of runs between their best cuts, and those of their hills; once, where runs are alike there."""
    numbers: dict[tuple[int, Slice], int] = {}
    seen: set[tuple[int, ...]] = set()
    for run in runs:
        inside = sorted(run.slices)
        numbered = [numbers.setdefault((index, run.slices[index]), len(numbers)) for index in inside]
        for start, ends in sorted(_intervals(program, run, inside).items()):
            first, new = bisect_left(inside, start), set()
            for end in ends:
                interval = (run.extent, run.steps, *numbered[first : bisect_right(inside, end)])
                if interval not in seen:
                    seen.add(interval)
                    new.add(end)
            if new:
                yield from _Sweep(program, run, start).candidates(new)


def _intervals(program: Program, run: Run, inside: Sequence[int]) -> dict[int, set[int]]:
    """The first nodes of a run that are worth a look, each with last ones; both are ``inside``, the sliced nodes."""
    cuts = program.cut_bytes
    starts = {run.start, *heapq.nsmallest(MOST_CUTS, inside, key=lambda index: cuts[index])}
    ends = {run.end, *heapq.nsmallest(MOST_CUTS, inside, key=lambda index: cuts[index + 1])}
    intervals = {start: {end for end in ends if end > start} for start in starts}
    for start, end in _hills(program, run):
        if start in run.slices and end in run.slices:
            intervals.setdefault(start, set()).add(end)
    return intervals


def _hills(program: Program, run: Run) -> Iterator[tuple[int, int]]:
    """Intervals of a run across which nowhere fewer bytes live on than at both edges, and at some node many more."""
    cuts, live = program.cut_bytes, program.live_bytes
    least = LEAST_HILL * program.peak_bytes
    rising: list[tuple[int, float]] = []  # positions at rising cuts, and the most that is live from there on
    for at in range(run.start, run.end + 2):
        most = 0.0
        while rising:
            start, top = rising[-1]
            most = max(most, top)
            alone = at - start == 1 and not program.is_worth_a_loop(start, least)
            if most - cuts[start] >= least and at - start <= LONGEST_HILL and not alone:
                yield start, at - 1
            if cuts[start] < cuts[at]:
                rising[-1] = start, most
                break
            rising.pop()
        if at <= run.end:
            rising.append((at, live[at]))


def whole(program: Program, run: Run) -> Candidate | None:
    """A run from end to end."""
    return next(_Sweep(program, run, run.start).candidates({run.end}), None)


class _Sweep:
    """Memory of a body that grows node by node. Bytes in ``body`` are for one step of the axis.

    ``reach`` is how far, in steps, a node reads beyond its own slice, back to the first nodes. A node of a group whose
    last one reaches further is computed by the difference beyond the slice: ``short`` is what the bytes in ``body``
    would be more, if all were computed as far as the first.
    """

    def __init__(self, program: Program, run: Run, start: int) -> None:
        self.program, self.run, self.start = program, run, start
        self.held = program.cut_bytes[start]  # inputs of the group, and what lives across it
        self.hoisted = self.hoisting = 0  # whole values of the group, and the peak while they are computed
        self.body = self.short = 0.0
        self.reach: dict[int, float] = {}
        self.work = [0.0, 0.0, 0.0, 0.0]  # operations and bytes moved, and each times its node's reach
        self.moments: list[tuple[float, float]] = []
        self.outputs: dict[int, int] = {}  # position -> bytes of what the body makes that is still live
        self.expiring: dict[int, float] = {}  # copied windows, by the position of their last use
        self.windows: set[tuple[fx.Node, Slice | None]] = set()
        self.reads: dict[int, Any] = {}  # storages from outside -> layout that slices read, None where they differ
        self.sources: dict[int, fx.Node] = {}
        self.launches, self.traffic, self.whole = 0, 0.0, 0.0
        self.strided: dict[int, int] = {}  # contiguous bytes a step -> bytes read of windows
        self.mapped: dict[tuple[int, Slice], Stretches] = {}  # storages in files, and the windows that slices read
        self.read_whole: dict[int, int] = {}  # storages in files that slices read all of, and their bytes
        self.slowed: list[tuple[float, int]] = []

    def candidates(self, ends: set[int]) -> Iterator[Candidate]:
        for index in range(self.start, max(ends) + 1):
            if index not in self.run.slices:
                self._hoist(index)
                continue
            if not self._enter(index):
                return
            stored = self._stored(index) if index in ends else None
            if stored:
                over = self._overwrites(index)
                new = sum(size for at, size in self.outputs.items() if at not in over and not self._at_home(at))
                yield Candidate(
                    self.run,
                    self.start,
                    index,
                    self.held + max(self.hoisting, self.hoisted + new) + sum(self.read_whole.values()),
                    tuple(self.moments),
                    self.launches,
                    self.traffic + sum(self.outputs.values()),
                    self.whole,
                    self._strided(),
                    stored,
                    over,
                    *self._overlap(),
                    tuple(self.slowed),
                    (*self.mapped.values(), *self._written_home(over)),
                )

    def _written_home(self, over: Collection[int]) -> Iterator[Stretches]:
        """The windows of values in files that slices write, and don't read."""
        for at in self.outputs:
            if self._at_home(at) and at not in over:
                value = self.program.values[at].node.meta["val"]
                if isinstance(value, torch.Tensor):
                    yield Stretches.of(value, self.run.slices[at], self.run.extent)

    def _at_home(self, index: int) -> bool:
        """Whether what a position makes counts as in files."""
        return not self.program.at_home.isdisjoint(self.program.born[index])

    def _stored(self, end: int) -> tuple[int, ...] | None:
        """The positions whose values a loop stores that ends here: of several results, those that are picked of them.

        None where one is picked only later.
        """
        stored: list[int] = []
        for index in self.outputs:
            node = self.program.values[index].node
            if isinstance(node.meta["val"], torch.Tensor):
                stored.append(index)
                continue
            picked = [self.program.position.get(user, end + 1) for user in node.users]
            if any(at > end for at in picked):
                return None
            stored += [at for at in picked if self._lives_on(at, end)]
        return tuple(stored)

    def _lives_on(self, index: int, end: int) -> bool:
        """Whether a value is still needed after a position."""
        liveness = self.program.liveness
        return any(liveness.storages[storage].death > end for storage in liveness.of[liveness.schedule[index]])

    def _overlap(self) -> tuple[float, tuple[float, float]]:
        halo, extent = max(self.reach.values()), self.run.extent
        flops, moved, flops_reach, moved_reach = self.work
        return halo, ((halo * flops - flops_reach) / extent, (halo * moved - moved_reach) / extent)

    def _hoist(self, index: int) -> None:
        storages = self.program.liveness.storages
        made = [storages[s] for s in self.program.born[index]]
        self.hoisted += self.program.born_bytes[index]
        self.hoisting = max(self.hoisting, self.hoisted + self.program.liveness.transient[index])
        self.hoisted -= sum(storage.bytes for storage in made if storage.death == index)

    def _enter(self, index: int) -> bool:
        """Take one sliced node; False where it can't be in a loop that begins after what it reads was made."""
        program, extent, slices = self.program, self.run.extent, self.run.slices
        size, piece, cut = program.born_bytes[index], slices[index], self.run.cuts[index]
        whole = 0
        reach = own = cut.reach * extent
        for (node, at, size_of), read in zip(program.edges[index], cut.inputs, strict=True):
            if at >= self.start and at in slices:
                reach = max(reach, own + self.reach[at])
                continue
            if read is None and node.op != "get_attr":
                whole += size_of
            if not isinstance(node.meta["val"], torch.Tensor):
                return False
            self._window(node, read, size_of)
        self.reach[index] = reach
        if size:
            self.outputs[index] = size
            self.body += size / extent
            self.short += size / extent * reach
        fixed, step = program.transient(index, piece, cut)
        step *= piece.extent / extent
        self._moment(fixed - self.short - step * reach, self.body + step)
        self.body -= self.expiring.pop(index, 0.0)
        for storage in program.dying[index]:
            dead = program.liveness.storages[storage]
            birth = dead.birth
            if birth in self.outputs:
                self.outputs[birth] -= dead.bytes
                self.body -= dead.bytes / extent
                self.short -= dead.bytes / extent * self.reach[birth]
                if not self.outputs[birth]:
                    del self.outputs[birth]
        activations, weights = program.traffic[index]
        self.launches += program.launches[index] if activations else 0
        if activations:
            self.traffic += activations - whole + 2 * step * extent
            self.whole += weights + whole
        least = program.least_steps(index, piece, cut)
        if least > 1:
            self.slowed.append((least * extent / piece.extent, program.flops[index]))
        if self.run.haloed:
            work = program.flops[index], activations - whole if activations else 0
            self.work = [a + b for a, b in zip(self.work, (*work, *(reach * each for each in work)), strict=True)]
        return True

    def _moment(self, fixed: float, step: float) -> None:
        """Keep what may be the most that a body holds, at some length."""
        if not any(f >= fixed and s >= step for f, s in self.moments):
            self.moments = [(f, s) for f, s in self.moments if f > fixed or s > step]
            self.moments.append((fixed, step))

    def _window(self, node: fx.Node, piece: Slice | None, size: int) -> None:
        """Account for a value from outside, of ``size`` bytes, that the body reads."""
        for storage in self.program.liveness.of.get(node, ()):
            layout = None if piece is None else self.program.layout(node, piece)
            if storage in self.reads and self.reads[storage] != layout:
                layout = None
            self.reads[storage] = layout
            self.sources[storage] = node
            if storage in self.program.at_home:
                if piece is None:
                    self.read_whole[storage] = self.program.liveness.storages[storage].bytes
                else:
                    self.mapped[storage, piece] = Stretches.of(node.meta["val"], piece, self.run.extent)
        if piece is None or (node, piece) in self.windows:
            return
        self.windows.add((node, piece))
        run = _contiguous_bytes(node.meta["val"], piece)
        self.strided[run] = self.strided.get(run, 0) + size
        if piece.outer == 1:
            return
        copied = size / self.run.extent
        position = self.program.position
        last = max(position[user] for user in node.users if position.get(user, -1) in self.run.slices)
        self.body += copied
        self.expiring[last] = self.expiring.get(last, 0.0) + copied
        self.traffic += 2 * copied * self.run.extent
        self.launches += 1

    def _strided(self) -> dict[int, int]:
        strided = dict(self.strided)
        for index, size in self.outputs.items():
            value = self.program.values[index].node.meta["val"]
            if isinstance(value, torch.Tensor):
                run = _contiguous_bytes(value, self.run.slices[index])
                strided[run] = strided.get(run, 0) + size
        return strided

    def _overwrites(self, end: int) -> dict[int, fx.Node]:
        """Outputs that can be written over one of the group's dying inputs.

        Legal where the input's storage was made by the graph, dies in the group, and no slice of the body reads of it
        the bytes that an earlier slice's output is written to. An input may be larger than the output; it then lives
        as long, and is taken only where that raises memory nowhere above what the group holds without.
        """
        storages = self.program.liveness.storages
        free = {s: layout for s, layout in self.reads.items() if layout is not None and storages[s].death <= end}
        found: dict[int, fx.Node] = {}
        if free and self.run.windowed:
            free = self._read_where_written(free, end)
        for index in self.outputs if free else ():
            node = self.program.values[index].node
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor):
                continue
            layout = self.program.layout(node, self.run.slices[index])
            if layout is None:
                continue
            size = value.untyped_storage().nbytes()
            most = max(size, self._room(node, end))
            fitting = [
                storage
                for storage, read in free.items()
                if offset_bytes(read) + size <= storages[storage].bytes <= most
                and (lies_within(layout, read) or lies_behind(layout, read))
            ]
            if fitting:
                storage = min(fitting, key=lambda s: storages[s].bytes)
                found[index] = self.sources[storage]
                del free[storage]
        return found

    def _room(self, node: fx.Node, end: int) -> int:
        """Bytes that an output may hold, as long as it lives, without more being live than in the group."""
        program = self.program
        death = max(program.liveness.storages[storage].death for storage in program.liveness.of[node])
        if death >= len(program):
            return 0  # what is returned holds no more than it needs
        size = bytes_of(node.meta["val"])
        others = max(program.cut_bytes[end + 1 : death + 1], default=size) - size
        return self.held + self.hoisted + size - others

    def _read_where_written(self, free: dict[int, Any], end: int) -> dict[int, Any]:
        """Those storages that slices read no further than what they store, be it at a border or between."""
        body = [index for index in range(self.start, end + 1) if index in self.run.slices]
        extent, middle = self.run.extent, self.run.extent // 2
        if not all(_keeps_step(self.run.slices[index].extent, extent) for index in self.outputs):
            return {}
        for start in {0, *range(middle, min(middle + BETWEEN, extent)), extent - 1}:
            part = (start, start + 1)
            ranges = infer_ranges(self.program, self.run, body, list(self.outputs), part)
            for (node, piece), span in ranges.read.items():
                if piece is None or not _keeps_step(piece.extent, extent) or span != stored_part(piece, extent, part):
                    for storage in self.program.liveness.of.get(node, ()):
                        free.pop(storage, None)
            if not free:
                break
        return free


def _keeps_step(extent: int, other: int) -> bool:
    """Whether the steps of two extents go along each other in the same way everywhere, so that a few show all."""
    return extent % other == 0 or other % extent == 0


def _contiguous_bytes(value: torch.Tensor, piece: Slice) -> int:
    """Bytes that lie together in a window of one step."""
    return value.stride(piece.dim) * piece.inner * value.element_size()
