"""Recompute: compute a large value again where it is read late, instead of holding it until then.

A norm's statistics are known only when all of its input has been computed. Held, that input is in memory as a whole;
computed twice, once for the statistics and once for its values, it is never. The same is done for any large value that
is live where memory is high, if it can be computed from what is live then anyway or is much smaller than it. What is
drawn at random is not computed again, nor anything behind a write to a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import fx

from fxstream.passes.graph.capture import rebuilt
from fxstream.passes.graph.effects import draws, writes
from fxstream.passes.graph.propagate import evaluate, fake_mode_of
from fxstream.passes.planning.program import Program

MOST_NODES = 8
"""A value that takes more operators, views apart, to compute from what is at hand is held."""

SMALLER = 0.5
"""A value of at most this share of another is held instead of it."""


def recompute(program: Program, storages: Iterable[int]) -> fx.GraphModule | None:
    """A graph module in which some storages, by their index in the liveness, are computed anew for each late use.

    Uses between which no statistics are taken have one computation in common. None where nothing can be recomputed.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph_module.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    source = program.liveness.storages
    changed = False
    with torch.no_grad(), fake_mode_of(program.graph_module.graph):
        for storage in sorted(storages, key=lambda index: -source[index].birth):
            for users in _late_uses(program, storage):
                closure = _closure(program, storage, program.position[users[0]])
                if closure is not None:
                    _Copies(program, storage, closure, graph, env).give(users)
                    changed = True
    return rebuilt(program.graph_module, graph, "Recomputing") if changed else None


def _late_uses(program: Program, storage: int) -> list[list[fx.Node]]:
    """The nodes that compute with a storage, apart by the statistics that are taken between them, but for the first."""
    statistics = accumulate(value.node.meta.get("part") == "statistics" for value in program.values)
    uses: dict[int, list[fx.Node]] = {}
    for index, (value, taken) in enumerate(zip(program.values, statistics, strict=True)):
        if not program.is_view(index) and any(storage in program.liveness.of.get(node, ()) for node in value.reads):
            uses.setdefault(taken, []).append(value.node)
    return list(uses.values())[1:]


def _closure(program: Program, storage: int, late: int) -> set[fx.Node] | None:
    """The nodes to run again at position ``late`` for a storage; None where that takes too much."""
    storages, of = program.liveness.storages, program.liveness.of
    made = storages[storage]
    if made.death >= len(program):
        return None
    closure, pending = set(), [made.node]
    while pending:
        node = pending.pop()
        if node in closure:
            continue
        if draws(node):
            return None
        closure.add(node)
        if sum(not program.is_view(program.position[each]) for each in closure) > MOST_NODES:
            return None
        for read in node.all_input_nodes:
            held = [storages[s] for s in of.get(read, ())]
            if any(s.death < late and s.bytes > SMALLER * made.bytes for s in held):
                pending.append(read)
    between = program.values[min(map(program.position.__getitem__, closure)) : late]
    return None if any(writes(value.node) for value in between) else closure


class _Copies:
    """Copies of the nodes that make one storage, and of views of it, for some of its users."""

    def __init__(
        self, program: Program, storage: int, closure: set[fx.Node], graph: fx.Graph, env: dict[fx.Node, fx.Node]
    ) -> None:
        self.program, self.storage, self.closure, self.graph, self.env = program, storage, closure, graph, env
        self.copied: dict[fx.Node, fx.Node] = {}

    def give(self, users: Sequence[fx.Node]) -> None:
        with self.graph.inserting_before(self.env[users[0]]):
            for user in users:
                for node in user.all_input_nodes:
                    if self._is_view(node):
                        self.env[user].replace_input_with(self.env[node], self._copy(node))

    def _is_view(self, node: fx.Node) -> bool:
        return self.storage in self.program.liveness.of.get(node, ())

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.closure and not self._is_view(node):
            return self.env[node]
        if node not in self.copied:
            inputs = {read: self._copy(read) for read in node.all_input_nodes}
            copy = self.graph.node_copy(node, inputs.__getitem__)
            copy.meta = {"origin": node.name, **node.meta, "val": evaluate(copy)}
            self.copied[node] = copy
        return self.copied[node]
