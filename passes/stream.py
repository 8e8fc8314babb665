"""Stream: the passes in order, from a captured graph and a budget to the rewritten graph.

Groups are chosen by estimate, built, and held against the liveness of what was built; where a body needs more than
was estimated, the choice is made again with what is now known. Where no choice of loops meets the budget, or a lower
one is wanted, the whole graph is first cut along an axis that runs through nearly all of it (the batch, as a rule), and
the body of that outer loop is streamed in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxstream.passes.cost import CostModel, cost_model
from fxstream.passes.grouping import Group, Grouping, lengths_of
from fxstream.passes.liveness import MemoryProfile, profile, tensors_of
from fxstream.passes.program import Program
from fxstream.passes.runs import Run, find_runs
from fxstream.passes.slicing import Slicer

HOT_SHARE = 0.1
"""Runs are looked for where at least this share of the peak is live."""

OUTER_SHARE = 0.5
"""A run through at least this share of the graph may become an outer loop."""

SLACK = 1.01
"""The lowest reachable peak is met within one per cent, at the least time."""

ROUNDS = 8


@dataclass(frozen=True)
class Streamed:
    """A rewritten graph: ``groups`` in schedule order, those of an outer loop's body after it in ``inner``."""

    graph_module: fx.GraphModule
    groups: tuple[Group, ...]
    program: Program
    after: MemoryProfile
    inner: Streamed | None = None


def stream(graph_module: fx.GraphModule, budget: int | None) -> Streamed:
    """Rewrite a normalized graph until its peak is within ``budget`` bytes (over its weights and inputs).

    ``None`` asks for the lowest reachable. Where the budget can't be met, the result is the lowest reached.
    """
    program = Program(graph_module)
    before = profile(graph_module)
    if budget is not None and before.peak_bytes <= budget:
        return Streamed(graph_module, (), program, before)
    costs = _costs(program)
    hot = [index for index, live in enumerate(program.live_bytes) if live >= HOT_SHARE * before.peak_bytes]
    runs = find_runs(program, hot)
    outer = [run for run in runs if len(run.slices) >= OUTER_SHARE * len(program)]
    flat = _flat(program, [run for run in runs if run not in outer], costs, budget)
    if not outer or (budget is not None and flat.after.peak_bytes <= budget):
        return flat
    nested = _nested(program, max(outer, key=lambda run: len(run.slices)), costs, budget)
    return min((flat, nested), key=lambda found: found.after.peak_bytes)


def _costs(program: Program) -> CostModel:
    value = next(t for node in program.liveness.schedule for t in tensors_of(node.meta["val"]))
    return cost_model(value.device)


def _flat(program: Program, runs: Sequence[Run], costs: CostModel, budget: int | None) -> Streamed:
    """Loops side by side."""
    grouping, slicer = Grouping(program, runs, costs), Slicer(program)
    best: Streamed | None = None
    for _ in range(ROUNDS):
        lowest = grouping.lowest_bytes()
        target = lowest * SLACK if budget is None else max(lowest, budget)
        groups = grouping.choose(target) or []
        for group in groups:
            for length in set(group.lengths):
                group.candidate.measured[length] = slicer.loop(group).body_bytes()
        rewritten = slicer.rewrite(groups)
        found = Streamed(rewritten, tuple(groups), program, profile(rewritten))
        if best is None or found.after.peak_bytes < best.after.peak_bytes:
            best = found
        if found.after.peak_bytes <= target:
            break
    assert best is not None
    return best


def _nested(program: Program, run: Run, costs: CostModel, budget: int | None) -> Streamed:
    """One loop around nearly all of the graph, its body streamed in turn."""
    grouping, slicer = Grouping(program, [], costs), Slicer(program)
    candidate = grouping.whole(run)
    group = Group(candidate, lengths_of(run.extent, run.extent))
    loop = slicer.loop(group)
    rewritten = slicer.rewrite([group])
    outside = profile(rewritten).peak_bytes - loop.body_bytes()
    inner: Streamed | None = None
    for length, body in list(loop.module.bodies.items()):
        inner = stream(body, None if budget is None else max(budget - outside, 1))
        loop.module.bodies[length] = inner.graph_module
    return Streamed(rewritten, (group,), program, profile(rewritten), inner)
