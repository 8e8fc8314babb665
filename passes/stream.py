"""Stream: the passes in order, from a captured graph and a budget to the rewritten graph.

Groups are chosen by estimate, built, and held against the liveness of what was built; where a body needs more than
was estimated, the choice is made again with what is now known. Where no choice of loops meets the budget, or a lower
one is wanted, the whole graph is first cut along an axis that runs through nearly all of it (the batch, as a rule), and
the body of that outer loop is streamed in turn. Where time may be spent for memory, large values that are live where
memory is still too high are computed again for their late uses, and the graph so changed is streamed once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

from torch import fx

from fxstream.passes.graph.collector import collector_paused
from fxstream.passes.graph.flops import flops
from fxstream.passes.graph.liveness import MemoryProfile, profile, tensors_of
from fxstream.passes.machine.cost import CostModel, cost_model
from fxstream.passes.planning.candidates import Candidate, find_candidates, whole
from fxstream.passes.planning.grouping import Group, Grouping, lengths_of
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.rewriting.recompute import recompute
from fxstream.passes.rewriting.schedule import schedule
from fxstream.passes.rewriting.slicing import Slicer
from fxstream.passes.rewriting.split_norms import split_norms
from fxstream.passes.rewriting.split_reductions import split_reductions
from fxstream.runtime.loop import SlicedLoop

HOT_SHARE = 0.1
"""Runs are looked for where at least this share of the peak is live, or will be at the next node."""

LARGE_SHARE = 0.01
"""An outer loop begins at one of the first nodes that move at least this share of the peak."""

FIRST_LARGE = 8
"""How many of those nodes are tried: the first may be constants, such as positions, that no such loop runs through."""

OUTER_SHARE = 0.5
"""A run through at least this share of the graph may become an outer loop."""

MOST_OUTER = 32
"""Bodies of outer loops that are worth running, over all levels."""

GOOD_SHARE = 0.25
"""Where an outer loop brings the peak to this share, loops side by side are not tried for a lower one."""

SLACK = 1.01
"""The lowest reachable peak is met within one per cent, at the least time."""

ROUNDS = 8

DEEPER = 2
"""How often the bodies of the loops that make the peak are streamed, where that moves it to others."""

NEAR_SHARE = 0.96
"""For the lowest peak, the bodies of loops are streamed that hold more than this share of the lowest reached."""

HIGH_SHARE = 0.9
"""Below the lowest peak reached, values are computed again that are live where this share of it is."""

MOST_ADDED = 1.0
"""Recomputing adds at most this share of a graph's operations."""


@dataclass(frozen=True)
class Streamed:
    """A rewritten graph: ``groups`` in schedule order; ``inner`` has what became of the bodies that were streamed.

    ``program`` is what was sliced; ``recomputed_flops`` are the operations in it that were not in the graph given.
    """

    graph_module: fx.GraphModule
    groups: tuple[Group, ...]
    program: Program
    after: MemoryProfile
    inner: dict[Group, Streamed] = field(default_factory=dict)
    recomputed_flops: int = 0

    @property
    def added_flops(self) -> int:
        """Operations that recomputing adds, those in the slices of loops with it."""
        inside = sum(found.added_flops * len(group.lengths) for group, found in self.inner.items())
        return self.recomputed_flops + inside


@collector_paused()
def stream(
    graph_module: fx.GraphModule, budget: int | None, allow_recompute: bool = False, most_outer: int = MOST_OUTER
) -> Streamed:
    """Rewrite a normalized graph until its peak is within ``budget`` bytes (over its weights and inputs).

    ``None`` asks for the lowest reachable. Where the budget can't be met, the result is the lowest reached. With
    ``allow_recompute`` values may be computed twice, where the budget can't be met without. Outer loops make at most
    ``most_outer`` bodies, all together.
    """
    found = _recomputed(graph_module, budget, 0.0, most_outer)
    if not allow_recompute or (budget is not None and found.after.peak_bytes <= budget):
        return found
    spare = MOST_ADDED * sum(flops(graph_module).values())
    return min(found, _recomputed(graph_module, budget, spare, most_outer), key=lambda each: each.after.peak_bytes)


def _recomputed(graph_module: fx.GraphModule, budget: int | None, spare: float, most_outer: int) -> Streamed:
    """``stream``, where recomputing adds at most ``spare`` operations."""
    best = latest = _stream(graph_module, budget, spare, most_outer)
    given = sum(flops(graph_module).values()) if spare else 0
    for _ in range(ROUNDS if spare else 0):
        if budget is not None and best.after.peak_bytes <= budget:
            break
        limit = max(HIGH_SHARE * latest.after.peak_bytes, budget or 0)
        changed = recompute(latest.program, _held_above(latest, limit))
        if changed is None:
            break
        added = sum(flops(changed).values()) - given
        if added > spare:
            break
        latest = replace(_stream(changed, budget, spare - added, most_outer), recomputed_flops=added)
        if latest.after.peak_bytes < best.after.peak_bytes:
            best = latest
    return best


def _held_above(streamed: Streamed, limit: float) -> set[int]:
    """Large storages of a program, by index, that a streamed graph holds where more than ``limit`` bytes are live."""
    program, after, held = streamed.program, streamed.after, set()
    names = {value.node.name: (index, index) for index, value in enumerate(program.values)}
    names |= {f"loop_{number}": (group.start, group.end) for number, group in enumerate(streamed.groups)}
    for name, live in zip(after.nodes, after.live_bytes, strict=True):
        start, end = names.get(name, (0, -1))
        for index, storage in enumerate(program.liveness.storages) if live > limit else ():
            across = (
                storage.birth <= end and storage.death >= start and not start <= storage.birth <= storage.death <= end
            )
            if storage.bytes >= LARGE_SHARE * after.peak_bytes and (across or start == end == storage.birth):
                held.add(index)
    return held


def _deepened(streamed: Streamed, budget: int | None, spare: float, floor: float) -> Streamed:
    """Stream the bodies of loops, too, where their inside is what is above the budget, or makes the peak.

    Where time may be spent for memory, the lowest peak is sought as far as ``floor``, below which no body counts.
    """
    for _ in range(DEEPER):
        after = streamed.after
        if budget is not None and after.peak_bytes <= budget:
            break
        groups = {f"loop_{number}": group for number, group in enumerate(streamed.groups)}
        live = {name: bytes for name, bytes in zip(after.nodes, after.live_bytes, strict=True) if name in groups}
        held = {name: sum(t.bytes for t in after.live_at(after.nodes.index(name))) for name in live} if spare else {}
        limit = NEAR_SHARE * after.peak_bytes if budget is None else budget
        if budget is None and spare:
            limit = max([SLACK * floor, *(live[name] for name in live if groups[name] in streamed.inner)])
        lowered = False
        for name in sorted(live, key=live.__getitem__, reverse=True):
            if live[name] > limit > held.get(name, 0) and groups[name] not in streamed.inner:
                left = spare - streamed.added_flops
                saved = _stream_bodies(streamed, name, groups[name], live[name] - limit, left)
                lowered |= saved > 0
                if budget is None and spare:
                    limit = max(limit, live[name] - saved)
        if not lowered:
            break
        streamed = replace(streamed, after=profile(streamed.graph_module))
    return streamed


def _stream_bodies(streamed: Streamed, loop_name: str, group: Group, excess: float, spare: float) -> int:
    """Stream the bodies of one loop, to hold ``excess`` bytes less; by how much that lowered the peak of them all."""
    loop = streamed.graph_module.get_submodule(loop_name)
    assert isinstance(loop, SlicedLoop)
    graphs = loop.graphs()
    peaks = {name: profile(body).peak_bytes for name, body in graphs.items()}
    target = max(1, int(max(peaks.values()) - excess))
    inner = {
        each: _recomputed(body, target, max(0.0, spare) / len(group.lengths), most_outer=0)
        for each, body in graphs.items()
        if peaks[each] > target
    }
    most = max(inner[each].after.peak_bytes if each in inner else peak for each, peak in peaks.items())
    saved = max(peaks.values()) - most
    if saved > 0:
        loop.bodies.update({name: found.graph_module for name, found in inner.items()})
        streamed.inner[group] = max(inner.values(), key=lambda found: found.after.peak_bytes)
    return saved


def _stream(graph_module: fx.GraphModule, budget: int | None, spare: float, most_outer: int) -> Streamed:
    """``_recomputed`` of a graph as it is: loops side by side, or one around nearly all of it and more inside.

    The bodies of loops may be changed; those within an outer loop's body only where that has outer loops, too.
    """
    before = profile(graph_module)
    if not before.peak_bytes or (budget is not None and before.peak_bytes <= budget):
        return _unchanged(graph_module, before)
    deep = most_outer > 0
    least = LARGE_SHARE * before.peak_bytes
    program = Program(split_reductions(split_norms(schedule(graph_module), least), least))
    costs = _costs(program)
    outer = _outer(program, before.peak_bytes, most_outer)
    found = []
    if budget is None and outer is not None:
        found.append(_nested(program, outer, costs, None, spare, most_outer))
        if found[0].after.peak_bytes <= GOOD_SHARE * before.peak_bytes:
            return found[0]
    candidates = _candidates(program, range(len(program)))
    grouping = Grouping(program, [*candidates, *([outer] if outer else [])], costs)
    if outer is None:
        found.append(_flat(program, grouping, budget, spare, deep))
    elif budget is None:
        if grouping.lowest_bytes() < found[0].after.peak_bytes:
            found.append(_flat(program, grouping, None, spare, deep))
    else:
        if grouping.lowest_bytes() <= budget:
            found.append(_flat(program, grouping, budget, spare, deep))
            if found[0].after.peak_bytes <= budget:
                return found[0]
        found.append(_nested(program, outer, costs, budget, spare, most_outer))
    best = min(found, key=lambda streamed: streamed.after.peak_bytes)
    return best if best.after.peak_bytes < before.peak_bytes else _unchanged(graph_module, before)


def _unchanged(graph_module: fx.GraphModule, before: MemoryProfile) -> Streamed:
    return Streamed(graph_module, (), Program(graph_module), before)


def _costs(program: Program) -> CostModel:
    value = next(t for node in program.liveness.schedule for t in tensors_of(node.meta["val"]))
    return cost_model(value.device)


def _outer(program: Program, peak_bytes: int, most: int) -> Candidate | None:
    """The run through nearly all of the graph, from one of its first large values on, whose body holds least."""
    large = (i for i in range(len(program)) if program.traffic[i][0] >= LARGE_SHARE * peak_bytes)
    runs = find_runs(program, islice(large, FIRST_LARGE))
    through = [run for run in runs if len(run.slices) >= OUTER_SHARE * len(program)]
    runs = [run for run in through if run.extent <= most]
    found = [candidate for run in runs if (candidate := whole(program, run)) is not None]
    alone = [candidate for candidate in found if not candidate.run.windowed]  # all slices have one body
    return min(alone, key=lambda candidate: candidate.peak_bytes(candidate.run.extent), default=None)


def _candidates(program: Program, where: Iterable[int]) -> list[Candidate]:
    """The candidates of the runs at those positions where memory is high."""
    hot, live = HOT_SHARE * program.peak_bytes, program.live_bytes
    runs = find_runs(program, [index for index in where if max(live[index : index + 2]) >= hot])
    return list(find_candidates(program, runs))


def _flat(
    program: Program,
    grouping: Grouping,
    budget: int | None,
    spare: float,
    deep: bool,
    slicer: Slicer | None = None,
    inner: dict[Group, Streamed] | None = None,
) -> Streamed:
    """Loops side by side; where ``deep``, with bodies that are streamed where they make the peak."""
    slicer = slicer or Slicer(program)
    best = _chosen(program, grouping, budget, slicer, inner or {})
    if not deep:
        return best
    best = _deepened(best, budget, spare, grouping.floor_bytes())
    while spare and best.inner and (budget is None or best.after.peak_bytes > budget):
        for group in best.inner:
            for length, body_bytes in slicer.loop(group).body_bytes().items():
                grouping.learn(group, length, body_bytes)
        found = _chosen(program, grouping, budget, slicer, best.inner)
        found = _deepened(found, budget, spare, grouping.floor_bytes())
        if found.after.peak_bytes >= best.after.peak_bytes:
            break
        best = found
    return best


def _chosen(
    program: Program, grouping: Grouping, budget: int | None, slicer: Slicer, inner: dict[Group, Streamed]
) -> Streamed:
    """Loops side by side, as they are; ``inner`` has the bodies that were streamed before."""
    best: Streamed | None = None
    for _ in range(ROUNDS):
        lowest = grouping.lowest_bytes()
        target = lowest * SLACK if budget is None else max(lowest, budget)
        groups = grouping.choose(target) or []
        for group in groups:
            for length, body_bytes in slicer.loop(group).body_bytes().items():
                grouping.learn(group, length, body_bytes)
        rewritten = slicer.rewrite(groups)
        known = {group: inner[group] for group in groups if group in inner}
        found = Streamed(rewritten, tuple(groups), program, profile(rewritten), known)
        if best is None or found.after.peak_bytes < best.after.peak_bytes:
            best = found
        if found.after.peak_bytes <= target:
            break
        if not grouping.hold_larger(groups):
            for group in groups:
                grouping.avoid_larger(group)
    assert best is not None
    return best


def _nested(
    program: Program,
    outer: Candidate,
    costs: CostModel,
    budget: int | None,
    spare: float,
    most_outer: int,
) -> Streamed:
    """One loop around nearly all of the graph, its body streamed in turn, beside the loops that the rest needs."""
    slicer = Slicer(program)
    group = Group(outer, lengths_of(outer.run.extent, outer.run.extent))
    bodies = slicer.loop(group).module.bodies
    [(name, body)] = bodies.items()
    assert isinstance(body, fx.GraphModule)
    left = None if budget is None else max(budget - outer.fixed_bytes, 1)
    inner = _recomputed(body, left, spare / outer.run.extent, most_outer // outer.run.extent)
    bodies[name] = inner.graph_module
    outside = [index for index in range(len(program)) if not outer.start <= index <= outer.end]
    grouping = Grouping(program, _candidates(program, outside), costs)
    grouping.fix(group, inner.after.peak_bytes)
    return _flat(program, grouping, budget, spare, most_outer > 0, slicer, {group: inner})
