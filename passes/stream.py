"""Stream: the passes in order, from a captured graph and a budget to the rewritten graph.

Groups are chosen by estimate, built, and held against the liveness of what was built; where a body needs more than
was estimated, the choice is made again with what is now known. Where no choice of loops meets the budget, or a lower
one is wanted, the whole graph is first cut along an axis that runs through nearly all of it (the batch, as a rule), and
the body of that outer loop is streamed in turn. Where time may be spent for memory, large values that are live where
memory is still too high are computed again for their late uses, and the graph so changed is streamed once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import inf

from torch import fx

from fxstream.passes.graph.capture import rebuilt
from fxstream.passes.graph.collector import collector_paused
from fxstream.passes.graph.flops import flops
from fxstream.passes.graph.liveness import bodies_bytes, loop_at, profile
from fxstream.passes.machine.cost import CostModel, cost_model
from fxstream.passes.planning.candidates import Candidate, find_candidates, whole
from fxstream.passes.planning.grouping import Group, Grouping, lengths_of
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.planning.tree import Block, Loop
from fxstream.passes.rewriting.recompute import recompute
from fxstream.passes.rewriting.schedule import schedule
from fxstream.passes.rewriting.slicing import Slicer, loop_name
from fxstream.passes.rewriting.spills import spill_values
from fxstream.passes.rewriting.split_norms import split_norms
from fxstream.passes.rewriting.split_reductions import split_reductions

HOT_SHARE = 0.1
"""Runs are looked for where at least this share of the peak is live, or will be at the next node; or a value that may
be in files is in memory."""

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
"""What a loop's inside may hold over the lowest."""

STILL_LOWER = 0.8
"""What is asked for after the lowest peak, to see whether there is a lower one."""

NEAR = (1.01, 1.02, 1.04)
"""The lowest reachable peak is met within one per cent, as the last of it costs many times the launches: at the least
time, or where loops that are chosen by time don't come so near, within two per cent, or four."""

ROUNDS = 8

DEEPER = 2
"""How often the bodies of the loops that make the peak are streamed, where that moves it to others."""

NEAR_SHARE = 0.96
"""For the lowest peak, the bodies of loops are streamed that hold more than this share of the lowest reached."""

HIGH_SHARE = 0.9
"""Below the lowest peak reached, values are computed again that are live where this share of it is."""

MOST_ADDED = 1.0
"""Recomputing adds at most this share of a graph's operations."""


def stream(
    graph_module: fx.GraphModule, budget: int | None, allow_recompute: bool = False, most_outer: int = MOST_OUTER
) -> Block:
    """Rewrite a normalized graph until its peak is within ``budget`` bytes (over its weights and inputs).

    ``None`` asks for the lowest reachable. Where the budget can't be met, the result is the lowest reached. With
    ``allow_recompute`` values may be computed twice, where the budget can't be met without. Outer loops make at most
    ``most_outer`` bodies, all together.
    """
    return Streamer(graph_module, allow_recompute, most_outer)(budget)


class Streamer:
    """``stream`` of one graph to one budget after another."""

    def __init__(
        self, graph_module: fx.GraphModule, allow_recompute: bool = False, most_outer: int = MOST_OUTER
    ) -> None:
        self._search, self._spares = Search(graph_module, most_outer), [0.0]
        self._lowest: dict[float, Block] = {}
        if allow_recompute:
            self._spares.append(MOST_ADDED * sum(flops(graph_module).values()))

    @collector_paused()
    def __call__(self, budget: int | None) -> Block:
        search, spares = self._search, self._spares
        if budget is None:
            return min((search.lowest(spare) for spare in spares), key=_peak_bytes)
        found = []
        for spare in spares:
            found.append(search.streamed(budget, spare))
            if _peak_bytes(found[-1]) <= budget:
                return found[-1]
        for spare in spares:
            if spare not in self._lowest:
                self._lowest[spare] = search._low(spare)
        return min(*found, *self._lowest.values(), key=_peak_bytes)


def _peak_bytes(block: Block) -> int:
    return block.after.peak_bytes


@dataclass(frozen=True)
class Spilling:
    """Activations of ``least`` bytes and more may live in files, which are in ``folder``."""

    least: float
    folder: str


class Search:
    """Ways to stream one graph: what is found out of it, and of the bodies of its loops, serves all that are tried.

    With ``spilling`` activations may live in files.
    """

    def __init__(self, graph_module: fx.GraphModule, most_outer: int, spilling: Spilling | None = None) -> None:
        self.given, self.most_outer, self.spilling = graph_module, most_outer, spilling
        self.before = profile(graph_module)
        self._bodies: dict[fx.GraphModule, Search] = {}
        self._changed: list[Search] = []

    @cached_property
    def unchanged(self) -> Block:
        """The graph as it was given."""
        return Block(self.given, Program(self.given), self.before)

    @cached_property
    def program(self) -> Program:
        """The graph in the order of the lowest peak, its norms and reductions split."""
        least = LARGE_SHARE * self.before.peak_bytes
        split = split_reductions(split_norms(schedule(self.given), least), least)
        return Program(split, self.spilling.least if self.spilling else inf)

    @cached_property
    def slicer(self) -> Slicer:
        return Slicer(self.program)

    @cached_property
    def costs(self) -> CostModel:
        return cost_model(self.program.device)

    @cached_property
    def outer(self) -> Candidate | None:
        """The run through nearly all of the graph, from one of its first large values on, whose body holds least."""
        program, most = self.program, self.most_outer
        large = (i for i in range(len(program)) if program.traffic[i][0] >= LARGE_SHARE * self.before.peak_bytes)
        runs = find_runs(program, islice(large, FIRST_LARGE))
        through = [run for run in runs if len(run.slices) >= OUTER_SHARE * len(program)]
        runs = [run for run in through if run.extent <= most]
        found = [candidate for run in runs if (candidate := whole(program, run)) is not None]
        alone = [candidate for candidate in found if not candidate.run.windowed]  # all slices have one body
        return min(alone, key=lambda candidate: candidate.peak_bytes(candidate.run.extent), default=None)

    @cached_property
    def anywhere(self) -> Grouping:
        """The loops that there may be side by side."""
        outer = [self.outer] if self.outer else []
        return Grouping(self.program, [*self._candidates(range(len(self.program))), *outer], self.costs)

    def _candidates(self, where: Iterable[int]) -> list[Candidate]:
        """The candidates of the runs at those positions where memory is high."""
        hot, live = min(HOT_SHARE * self.program.peak_bytes, self.program.home_bytes), self.program.live_bytes
        runs = find_runs(self.program, [index for index in where if max(live[index : index + 2]) >= hot])
        return list(find_candidates(self.program, runs))

    def _inside(self, body: fx.GraphModule, most_outer: int = 0) -> Search:
        if body not in self._bodies:
            self._bodies[body] = Search(body, most_outer)
        return self._bodies[body]

    def lowest(self, spare: float) -> Block:
        """The graph near the lowest peak that is found for it, at the least time there."""
        found = self._low(spare)
        for share in NEAR if found.loops else ():
            limit = int(share * found.after.peak_bytes)
            again = self._again(found, limit, spare)
            if again.after.peak_bytes <= limit:
                return again
        return found

    def _low(self, spare: float) -> Block:
        """The lowest peak that is found: by itself, or asked for one still lower where one loop runs through all."""
        found = self.streamed(None, spare)
        if not self._is_nested(found):
            return found
        again = self._again(found, int(STILL_LOWER * found.after.peak_bytes), spare)
        return min(found, again, key=_peak_bytes)

    def _is_nested(self, found: Block) -> bool:
        """Whether a block has the loop through nearly all of the graph."""
        return self.outer is not None and any(loop.group.candidate is self.outer for loop in found.loops)

    def _again(self, found: Block, budget: int, spare: float) -> Block:
        """A block of the same form as one that was found, of the same program, to a budget."""
        search = next((each for each in self._changed if each.program is found.program), self)
        left = spare - found.recomputed_flops
        if search.outer is not None and search._is_nested(found):
            again = search._nested(search.outer, budget, left)
        else:
            again = search._side_by_side(search.anywhere, budget, left, {})
        return replace(again, recomputed_flops=found.recomputed_flops)

    def streamed(self, budget: int | None, spare: float) -> Block:
        """The graph to a budget, where recomputing adds at most ``spare`` operations."""
        best = latest = self._streamed(budget, spare)
        given = sum(flops(self.given).values()) if spare else 0
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
            search = Search(changed, self.most_outer)
            latest = replace(search._streamed(budget, spare - added), recomputed_flops=added)
            self._changed.append(search)
            if latest.after.peak_bytes < best.after.peak_bytes:
                best = latest
        return best

    def _streamed(self, budget: int | None, spare: float) -> Block:
        """``streamed`` of the graph as it is: loops side by side, or one around nearly all of it and more inside."""
        before = self.before.peak_bytes
        if not before or (budget is not None and before <= budget):
            return self.unchanged
        found = []
        if budget is None and self.outer is not None:
            found.append(self._nested(self.outer, None, spare))
            if found[0].after.peak_bytes <= GOOD_SHARE * before:
                return found[0]
        lowest = self.anywhere.lowest_bytes()
        if self.outer is None or (lowest < found[0].after.peak_bytes if budget is None else lowest <= budget):
            found.append(self._side_by_side(self.anywhere, budget, spare, {}))
        if self.outer is not None and budget is not None and not (found and found[0].after.peak_bytes <= budget):
            found.append(self._nested(self.outer, budget, spare))
        best = min(found, key=lambda block: block.after.peak_bytes)
        return best if best.after.peak_bytes < before else self.unchanged

    def _nested(self, outer: Candidate, budget: int | None, spare: float) -> Block:
        """One loop around nearly all of the graph, its body streamed in turn, beside the loops that the rest needs."""
        extent = outer.run.extent
        group = Group(outer, lengths_of(extent, extent))
        module = self.slicer.loop(group).module
        [(name, body)] = module.graphs().items()
        left = None if budget is None else max(budget - outer.fixed_bytes, 1)
        inner = self._inside(body, self.most_outer // extent).streamed(left, spare / extent)
        outside = [index for index in range(len(self.program)) if not outer.start <= index <= outer.end]
        grouping = Grouping(self.program, self._candidates(outside), self.costs)
        grouping.fix(group, inner.after.peak_bytes)
        loop = Loop("", group, module.with_bodies({name: inner.graph_module}), inner)
        return self._side_by_side(grouping, budget, spare, {group: loop})

    def _side_by_side(self, grouping: Grouping, budget: int | None, spare: float, known: Mapping[Group, Loop]) -> Block:
        """Loops side by side, with bodies that are streamed where they make the peak; ``known`` are some already.

        The bodies of loops within an outer loop's body are streamed only where that has outer loops, too.
        """
        best = self._chosen(grouping, budget, known)
        if not self.most_outer:
            return best
        best = self._deepened(best, budget, spare, grouping.floor_bytes())
        while spare and (budget is None or best.after.peak_bytes > budget):
            known = {loop.group: loop for loop in best.loops if loop.body is not None}
            if not known:
                break
            self._learn(grouping, known, known)
            found = self._chosen(grouping, budget, known)
            found = self._deepened(found, budget, spare, grouping.floor_bytes())
            if found.after.peak_bytes >= best.after.peak_bytes:
                break
            best = found
        return best

    def _chosen(self, grouping: Grouping, budget: int | None, known: Mapping[Group, Loop]) -> Block:
        """Loops side by side as they are built, chosen again while more is learned of what they hold."""
        best: Block | None = None
        for _ in range(ROUNDS):
            lowest = grouping.lowest_bytes()
            target = lowest if budget is None else max(lowest, budget)
            groups = grouping.choose(target) or []
            self._learn(grouping, groups, known)
            found = self._block(groups, known, target)
            if best is None or found.after.peak_bytes < best.after.peak_bytes:
                best = found
            if found.after.peak_bytes <= target:
                break
            if not grouping.hold_larger(groups):
                for group in groups:
                    grouping.avoid_larger(group)
        assert best is not None
        return best

    def _learn(self, grouping: Grouping, groups: Iterable[Group], known: Mapping[Group, Loop]) -> None:
        """Let the grouping know what the bodies of groups hold."""
        for group in groups:
            module = known[group].module if group in known else self.slicer.loop(group).module
            for length, held in bodies_bytes(module).items():
                grouping.learn(group, length, held)

    def _block(self, groups: Iterable[Group], known: Mapping[Group, Loop], target: float) -> Block:
        """The program with a loop for each group; those in ``known`` as they are there.

        What may live in files does where more than ``target`` bytes would be held.
        """
        loops = []
        for number, group in enumerate(groups):
            loop = known.get(group) or Loop("", group, self.slicer.loop(group).module)
            loops.append(replace(loop, name=loop_name(number)))
        rewritten = self.slicer.rewrite([loop.group for loop in loops], {loop.group: loop.module for loop in loops})
        if self.spilling is None:
            return Block(rewritten, self.program, profile(rewritten), tuple(loops))
        rewritten, spills = spill_values(rewritten, target, self.spilling.folder)
        loops = [replace(loop, module=loop_at(rewritten, loop.name)) for loop in loops]
        return Block(rewritten, self.program, profile(rewritten), tuple(loops), spills=spills)

    def _deepened(self, block: Block, budget: int | None, spare: float, floor: float) -> Block:
        """Stream the bodies of loops, too, where their inside is what is above the budget, or makes the peak.

        Where time may be spent for memory, the lowest peak is sought as far as ``floor``, below which no body counts.
        """
        for _ in range(DEEPER):
            after = block.after
            if budget is not None and after.peak_bytes <= budget:
                break
            at = {name: index for index, name in enumerate(after.nodes)}
            live = {loop: after.live_bytes[at[loop.name]] for loop in block.loops}
            limit = NEAR_SHARE * after.peak_bytes if budget is None else budget
            if budget is None and spare:
                limit = max([SLACK * floor, *(live[loop] for loop in block.loops if loop.body is not None)])
            deeper: dict[str, Loop] = {}
            left = spare - block.added_flops
            for loop in sorted(live, key=live.__getitem__, reverse=True):
                held = sum(tensor.bytes for tensor in after.live_at(at[loop.name])) if spare else 0
                if loop.body is not None or not live[loop] > limit > held:
                    continue
                found, saved = self._deeper(loop, live[loop] - limit, left)
                if saved > 0:
                    deeper[loop.name] = found
                    left -= found.added_flops
                if budget is None and spare:
                    limit = max(limit, live[loop] - saved)
            if not deeper:
                break
            block = _with_loops(block, deeper)
        return block

    def _deeper(self, loop: Loop, excess: float, spare: float) -> tuple[Loop, int]:
        """A loop with its bodies streamed, to hold ``excess`` bytes less; and by how much that lowered their peak."""
        bodies = {name: self._inside(body) for name, body in loop.module.graphs().items()}
        highest = max(body.before.peak_bytes for body in bodies.values())
        target, share = max(1, int(highest - excess)), max(0.0, spare) / len(loop.group.lengths)
        blocks = {
            name: body.streamed(target, share) for name, body in bodies.items() if body.before.peak_bytes > target
        }
        if not blocks:
            return loop, 0
        most = max(
            blocks[name].after.peak_bytes if name in blocks else body.before.peak_bytes for name, body in bodies.items()
        )
        module = loop.module.with_bodies(
            {name: blocks[name].graph_module if name in blocks else body.given for name, body in bodies.items()}
        )
        body = max(blocks.values(), key=lambda block: block.after.peak_bytes)
        return replace(loop, module=module, body=body), highest - most


def _with_loops(block: Block, others: Mapping[str, Loop]) -> Block:
    """The block with other loops in place of those of the same names."""
    graph_module = block.graph_module
    modules = {name: loop.module for name, loop in others.items()}
    made = rebuilt(graph_module, graph_module.graph, "Streamed", modules)
    loops = tuple(others.get(loop.name, loop) for loop in block.loops)
    return replace(block, graph_module=made, after=profile(made), loops=loops)


def _held_above(block: Block, limit: float) -> set[int]:
    """Large storages of a block's program, by index, that it holds where more than ``limit`` bytes are live."""
    storages, least, held = block.program.liveness.storages, LARGE_SHARE * block.after.peak_bytes, set()
    for start, end, live in block.intervals():
        for index, storage in enumerate(storages) if live > limit else ():
            born, dead = storage.birth, storage.death
            across = born <= end and dead >= start and not start <= born <= dead <= end
            if storage.bytes >= least and (across or start == end == born):
                held.add(index)
    return held
