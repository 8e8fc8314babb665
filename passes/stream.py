"""Stream: the passes in order, from a captured graph and a budget to the rewritten graph.

Groups are chosen by estimate, built, and held against the liveness of what was built; where a body needs more than
was estimated, the choice is made again with what is now known. Where no choice of loops meets the budget, or a lower
one is wanted, the whole graph is first cut along an axis that runs through nearly all of it (the batch, as a rule), and
the body of that outer loop is streamed in turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import fx

from fxstream.passes.candidates import Candidate, find_candidates, whole
from fxstream.passes.cost import CostModel, cost_model
from fxstream.passes.grouping import Group, Grouping, lengths_of
from fxstream.passes.liveness import MemoryProfile, profile, tensors_of
from fxstream.passes.program import Program
from fxstream.passes.runs import find_runs
from fxstream.passes.slicing import Slicer
from fxstream.passes.split_norms import split_norms

HOT_SHARE = 0.1
"""Runs are looked for where at least this share of the peak is live."""

LARGE_SHARE = 0.01
"""An outer loop begins at the first node that moves at least this share of the peak."""

OUTER_SHARE = 0.5
"""A run through at least this share of the graph may become an outer loop."""

MOST_OUTER = 32
"""Bodies of outer loops that are worth running, over all levels."""

GOOD_SHARE = 0.25
"""Where an outer loop brings the peak to this share, loops side by side are not tried for a lower one."""

SLACK = 1.01
"""The lowest reachable peak is met within one per cent, at the least time."""

ROUNDS = 8


@dataclass(frozen=True)
class Streamed:
    """A rewritten graph: ``groups`` in schedule order; ``inner`` has what became of the bodies that were streamed."""

    graph_module: fx.GraphModule
    groups: tuple[Group, ...]
    program: Program
    after: MemoryProfile
    inner: dict[Group, Streamed] = field(default_factory=dict)


def stream(graph_module: fx.GraphModule, budget: int | None, most_outer: int = MOST_OUTER) -> Streamed:
    """Rewrite a normalized graph until its peak is within ``budget`` bytes (over its weights and inputs).

    ``None`` asks for the lowest reachable. Where the budget can't be met, the result is the lowest reached. Outer loops
    make at most ``most_outer`` bodies, all together.
    """
    before = profile(graph_module)
    if budget is not None and before.peak_bytes <= budget:
        return Streamed(graph_module, (), Program(graph_module), before)
    program = Program(split_norms(graph_module, LARGE_SHARE * before.peak_bytes))
    costs = _costs(program)
    outer = _outer(program, before.peak_bytes, most_outer)
    found = []
    if budget is None and outer is not None:
        found.append(_nested(program, outer, costs, None, most_outer))
        if found[0].after.peak_bytes <= GOOD_SHARE * before.peak_bytes:
            return found[0]
    candidates = _candidates(program, range(len(program)))
    grouping = Grouping(program, [*candidates, *([outer] if outer else [])], costs)
    if outer is None:
        return _flat(program, grouping, budget)
    if budget is None:
        if grouping.lowest_bytes() < found[0].after.peak_bytes:
            found.append(_flat(program, grouping, None))
    else:
        if grouping.lowest_bytes() <= budget:
            found.append(_flat(program, grouping, budget))
            if found[0].after.peak_bytes <= budget:
                return found[0]
        found.append(_nested(program, outer, costs, budget, most_outer))
    return min(found, key=lambda streamed: streamed.after.peak_bytes)


def _costs(program: Program) -> CostModel:
    value = next(t for node in program.liveness.schedule for t in tensors_of(node.meta["val"]))
    return cost_model(value.device)


def _outer(program: Program, peak_bytes: int, most: int) -> Candidate | None:
    """The run through nearly all of the graph, from its first large value on, whose body holds least."""
    large = next(i for i in range(len(program)) if program.traffic(i)[0] >= LARGE_SHARE * peak_bytes)
    through = [run for run in find_runs(program, [large]) if len(run.slices) >= OUTER_SHARE * len(program)]
    runs = [run for run in through if run.extent <= most]
    found = [candidate for run in runs if (candidate := whole(program, run)) is not None]
    alone = [candidate for candidate in found if not candidate.halo]
    return min(alone, key=lambda candidate: candidate.peak_bytes(candidate.run.extent), default=None)


def _candidates(program: Program, where: Iterable[int]) -> list[Candidate]:
    """The candidates of the runs at those positions where memory is high."""
    hot = HOT_SHARE * max(program.live_bytes)
    runs = find_runs(program, [index for index in where if program.live_bytes[index] >= hot])
    return [candidate for run in runs for candidate in find_candidates(program, run)]


def _flat(program: Program, grouping: Grouping, budget: int | None, slicer: Slicer | None = None) -> Streamed:
    """Loops side by side."""
    slicer = slicer or Slicer(program)
    best: Streamed | None = None
    for _ in range(ROUNDS):
        lowest = grouping.lowest_bytes()
        target = lowest * SLACK if budget is None else max(lowest, budget)
        groups = grouping.choose(target) or []
        for group in groups:
            for length, body_bytes in slicer.loop(group).body_bytes().items():
                grouping.learn(group, length, body_bytes)
        rewritten = slicer.rewrite(groups)
        found = Streamed(rewritten, tuple(groups), program, profile(rewritten))
        if best is None or found.after.peak_bytes < best.after.peak_bytes:
            best = found
        if found.after.peak_bytes <= target:
            break
    assert best is not None
    return best


def _nested(program: Program, outer: Candidate, costs: CostModel, budget: int | None, most_outer: int) -> Streamed:
    """One loop around nearly all of the graph, its body streamed in turn, beside the loops that the rest needs."""
    slicer = Slicer(program)
    group = Group(outer, lengths_of(outer.run.extent, outer.run.extent))
    bodies = slicer.loop(group).module.bodies
    [(name, body)] = bodies.items()
    assert isinstance(body, fx.GraphModule)
    inner = stream(body, None if budget is None else max(budget - outer.fixed_bytes, 1), most_outer // outer.run.extent)
    bodies[name] = inner.graph_module
    outside = [index for index in range(len(program)) if not outer.start <= index <= outer.end]
    grouping = Grouping(program, _candidates(program, outside), costs)
    grouping.fix(group, inner.after.peak_bytes)
    streamed = _flat(program, grouping, budget, slicer)
    return replace(streamed, inner={group: inner} if group in streamed.groups else {})
