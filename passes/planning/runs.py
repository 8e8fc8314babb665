"""Runs: for a value and an axis, the longest run of consecutive nodes that can be sliced along it.

A run is scanned forward from its first node. A node that reads a sliced value takes the slice that its rule gives;
where the rule gives none, the run ends. A node that reads no sliced value is independent of the axis: it stays whole
(and is hoisted out of the loop) unless a later node of the run reads it sliced and it is large enough to be worth it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from fxstream.passes.graph.effects import writes
from fxstream.passes.operators.axes import Cut, Slice
from fxstream.passes.planning.program import Program, is_getitem

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
HOIST_SHARE = 1 / 64
"""An independent value is computed once, whole, before the loop, if neither it nor anything in the run that it is
computed from is larger than this share of what reads it."""

MOST_HALO = 0.25
"""A run ends where its first nodes would compute more than this share of the axis beyond each slice."""


LEAST_ALONE = 0.02
"""An operator is a run alone where its workspace is at least this share of the peak."""


@dataclass(frozen=True, eq=False)
class Run:
    """Nodes ``start`` to ``end`` of the schedule, those in ``slices`` under one axis, the others independent of it.

    Any interval of a run is a run. ``cuts`` tell for each sliced node what its slice reads. ``extent`` is that of the
    first node; where operators change the size of the dimension, those of others differ.
    """

    extent: int
    start: int
    end: int
    slices: dict[int, Slice]
    cuts: dict[int, Cut]

    @cached_property
    def steps(self) -> int:
        """The smallest extent of a node: no loop has more slices."""
        return min(piece.extent for piece in self.slices.values())

    @cached_property
    def haloed(self) -> bool:
        """Whether some node reads beyond its own slice."""
        return any(cut.reach > 0 for cut in self.cuts.values())

    @cached_property
    def windowed(self) -> bool:
        """Whether some node may read other steps than those of its slice."""
        return any(cut.halo is not None for cut in self.cuts.values())


def find_runs(program: Program, hot: Iterable[int]) -> list[Run]:
    """The runs that begin at, or hold, the positions ``hot``, each with two sliced operators or a large workspace."""
    factors = _factors(program)
    covered: set[tuple[int, Slice]] = set()
    runs = []
    for start in hot:
        value = program.values[start].node.meta["val"]
        if is_getitem(program.values[start].node) or not isinstance(value, torch.Tensor):
            continue
        for seed in _seeds(tuple(value.shape), factors):
            if (start, seed) in covered:
                continue
            run = _scan(program, start, seed)
            if run is not None:
                covered.update(run.slices.items())
                runs.append(run)
    return runs


def _factors(program: Program) -> dict[int, set[tuple[int, int, int]]]:
    """Size of a dimension -> (outer, extent, inner) of the axes that the graph merges into such a dimension."""
    factors: dict[int, set[tuple[int, int, int]]] = {}
    for value in program.values:
        if value.call.target in RESHAPES:
            before, after = tuple(value.call.tensors[0].shape), value.call.shape
            for merged, parts in (*_groups(before, after), *_groups(after, before)):
                for index, part in enumerate(parts):
                    triple = (prod(parts[:index]), part, prod(parts[index + 1 :]))
                    factors.setdefault(merged, set()).add(triple)
        elif value.call.target is aten.group_norm.default:
            channels, groups = value.call.shape[1], value.call.args[1]
            factors.setdefault(channels, set()).add((1, groups, channels // groups))
    return factors


def _groups(merged: tuple[int, ...], split: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each dimension of ``merged`` that is a product of several consecutive dimensions of ``split``."""
    at = 0
    for size in merged:
        total, parts = 1, []
        while at < len(split) and (total < size or split[at] == 1) and size % (total * split[at]) == 0:
            total *= split[at]
            parts.append(split[at])
            at += 1
        if total != size:
            return
        if sum(part > 1 for part in parts) > 1:
            yield size, tuple(parts)


def _seeds(shape: tuple[int, ...], factors: dict[int, set[tuple[int, int, int]]]) -> Iterator[Slice]:
    for dim, size in enumerate(shape):
        if size > 1:
            yield Slice(dim, size)
            for outer, extent, inner in sorted(factors.get(size, ())):
                if extent > 1:
                    yield Slice(dim, extent, outer, inner)


def _scan(program: Program, start: int, seed: Slice) -> Run | None:
    first = program.backward(start, seed)
    return None if first is None else _Scanner(program, start, seed, first).scan()


class _Scanner:
    """One scan: ``slices`` and ``cuts`` of the nodes taken so far.

    Those in ``pulled`` do not depend on the first node: any of them may be put back to be computed whole.
    """

    def __init__(self, program: Program, start: int, seed: Slice, first: Cut) -> None:
        self.program, self.start = program, start
        self.slices, self.cuts = {start: seed}, {start: first}
        self.pulled: set[int] = set()
        self.whole: set[int] = set()  # independent nodes that a sliced one reads whole
        self.reach: dict[int, float] = {}  # share of the axis that a node reads beyond its slice, back to the first
        self.largest: dict[int, int] = {}  # most bytes of a node and of all in the run that it is computed from

    def scan(self) -> Run | None:
        end = self.start
        for index in range(self.start, len(self.program)):
            if writes(self.program.values[index].node):
                break
            from_run = (self.largest.get(at, 0) for at in self.program.reads[index])
            self.largest[index] = max(self.program.value_bytes[index], *from_run, 0)
            if index != self.start and not self._take(index):
                if any(at in self.slices for at in self._reads(index)):
                    break
                continue
            if self._reach(index) > MOST_HALO:
                if index == self.start:
                    return None
                del self.slices[index], self.cuts[index]
                break
            least = HOIST_SHARE * self.program.value_bytes[index]
            self._take_inputs(index, least)
            end = index
        for index in range(self.start, end + 1):
            if index not in self.slices:
                for at in self._reads(index):
                    self._put_back(at)
        for index in range(self.start, end + 1):
            if is_getitem(self.program.values[index].node) and self._reads(index)[0] not in self.slices:
                self._put_back(index)  # no window can be read of a list
        work = [index for index in self.slices if not self.program.is_view(index)]
        extent = self.slices[self.start].extent
        if len(work) < 2 and not self.program.is_worth_a_loop(self.start, LEAST_ALONE * self.program.peak_bytes):
            return None
        return Run(extent, self.start, end, self.slices, self.cuts)

    def _reach(self, index: int) -> float:
        own = self.cuts[index].reach
        self.reach[index] = own + max((self.reach.get(at, 0.0) for at, _ in self._edges(index)), default=0.0)
        return self.reach[index]

    def _reads(self, index: int) -> list[int]:
        """Positions in the run that a node reads, -1 for what comes from before it."""
        return [at if at >= self.start else -1 for at in self.program.reads[index]]

    def _edges(self, index: int) -> list[tuple[int, Slice | None]]:
        edges = zip(self._reads(index), self.cuts[index].inputs, strict=True)
        return [(at, piece) for at, piece in edges if at >= 0]

    def _take(self, index: int) -> bool:
        """Slice a node that reads a sliced value; False where none is read, or the rule gives no slice.

        Where it is pulled values that the rule can't do with, they are put back.
        """
        reads = self._reads(index)
        known = {k: self.slices[at] for k, at in enumerate(reads) if at in self.slices}
        if not known:
            return False
        if is_getitem(self.program.values[index].node):
            found: tuple[Slice, Cut] | None = (known[0], Cut((known[0],)))
        else:
            found = self.program.forward(index, known)
        if found is not None:
            self.slices[index], self.cuts[index] = found
            if all(reads[k] in self.pulled for k in known):
                self.pulled.add(index)
            return True
        pulled = [reads[k] for k in known if reads[k] in self.pulled]
        for at in pulled:
            self._put_back(at)
        return self._take(index) if pulled else False

    def _pull(self, index: int, piece: Slice, least: float) -> None:
        """Take an independent node as the slice that is read of it, and what it reads in turn."""
        value = self.program.values[index]
        if index in self.whole or not value.reads or self.largest[index] < least:
            return
        cut = Cut((piece,)) if is_getitem(value.node) else self.program.backward(index, piece)
        if cut is None:
            return
        self.slices[index], self.cuts[index] = piece, cut
        self.pulled.add(index)
        self._take_inputs(index, least)

    def _take_inputs(self, index: int, least: float) -> None:
        """Pull in what a sliced node reads sliced, where that is possible, and leave whole what it reads whole."""
        for at, piece in self._edges(index):
            if piece is None:
                self.whole.add(at)
            elif at not in self.slices:
                self._pull(at, piece, least)
        for at, piece in self._edges(index):
            if at in self.slices and self.slices[at] != piece:
                self._put_back(at)

    def _put_back(self, index: int) -> None:
        """Compute a pulled node whole after all, and so all that it reads."""
        if index in self.pulled:
            self.pulled.discard(index)
            del self.slices[index], self.cuts[index]
            for at in self._reads(index):
                self._put_back(at)
