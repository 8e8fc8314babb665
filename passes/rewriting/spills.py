"""Spills: activations in files, where loops read their windows and store their slices, so that slices alone are held.

What a loop makes is stored there slice by slice; what another operator makes is sent there when it is made. A loop
reads a window at a time, another operator all of it. Where most is held, that goes which lowers it most, until a limit
is met.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxstream.passes.graph.capture import module_path, rebuilt
from fxstream.passes.graph.effects import has_effect, memories, written_by
from fxstream.passes.graph.liveness import Liveness, analyze, bytes_of, loop_of, mapped_bytes, touched
from fxstream.passes.planning.tree import Spill
from fxstream.runtime.release import give_back
from fxstream.runtime.spill import send_home


def spill_values(graph_module: fx.GraphModule, limit: float, folder: str) -> tuple[fx.GraphModule, tuple[Spill, ...]]:
    """A graph module that holds at most ``limit`` bytes over weights and inputs, and what it has in files for that.

    Where the limit can't be met, it holds as little as this can make it hold. The same one where nothing goes.
    """
    liveness = analyze(graph_module)
    values = list(_values(graph_module, liveness, folder))
    live, chosen = torch.tensor(liveness.live_bytes(), dtype=torch.int64), list[_Value]()
    while len(live) and int(live.max()) > limit:
        peak = int(live.argmax())
        best = max(values, key=lambda value: value.gains(peak), default=None)
        if best is None or best.gains(peak) <= 0:
            break
        values.remove(best)
        chosen.append(best)
        for position in range(best.birth, best.death + 1):
            live[position] -= best.gains(position)
    if not chosen:
        return graph_module, ()
    return _rewritten(graph_module, chosen, folder), tuple(value.spill() for value in chosen)


@dataclass(eq=False)
class _Value:
    """A storage that may go: ``key`` is its identity, ``uses`` are the positions among loops' inputs that are it.

    ``outputs`` are those among its maker's, where that is a loop. ``mapped`` is how much of it is in memory at the
    positions of the schedule that use it, and ``moved`` what all of them read and write.
    """

    node: fx.Node
    key: int
    bytes: int
    birth: int
    death: int
    uses: dict[fx.Node, set[int]] = field(default_factory=lambda: defaultdict(set))
    outputs: set[int] = field(default_factory=set)
    mapped: dict[int, int] = field(default_factory=dict)
    moved: int = 0

    def gains(self, position: int) -> int:
        """Bytes less that are held at a position of the schedule."""
        there = self.birth <= position <= self.death
        return self.bytes - self.mapped.get(position, 0) if there else 0

    def spill(self) -> Spill:
        return Spill(self.node.name, module_path(self.node), self.bytes, self.moved)


def _values(graph_module: fx.GraphModule, liveness: Liveness, folder: str) -> Iterator[_Value]:
    """The storages that may go."""
    lying: dict[int, list[fx.Node]] = defaultdict(list)
    for node, indices in liveness.of.items():
        for index in indices:
            lying[index].append(node)
    position = {node: index for index, node in enumerate(liveness.schedule)}
    used: dict[int, list[int]] = defaultdict(list)
    for node, at in position.items():
        for key in dict(touched(node)):
            used[key].append(at)
    for index, storage in enumerate(liveness.storages):
        returned = storage.death == len(liveness.schedule)
        if storage.bytes and not returned and _may_go(graph_module, storage.node, lying[index]):
            value = _Value(storage.node, storage.key, storage.bytes, storage.birth, storage.death)
            for node in lying[index]:
                for user in node.users:
                    if user.op == "call_module":
                        value.uses[user] |= {at for at, argument in enumerate(user.args) if argument is node}
            if storage.node.op == "call_module":
                made = enumerate(storage.node.meta["val"])
                value.outputs = {at for at, each in made if storage.key in memories(each)}
            _measure(graph_module, value, position, used[storage.key], folder)
            yield value


def _may_go(graph_module: fx.GraphModule, maker: fx.Node, lying: list[fx.Node]) -> bool:
    """Whether a storage in which these nodes' values lie is one tensor, that is written once."""
    value = maker.meta["val"]
    if maker.op == "call_module":
        value = next(each for each in value if memories(each) & memories(lying[0].meta["val"]))
    elif not isinstance(value, torch.Tensor) or has_effect(maker):
        return False
    return bytes_of(value) == value.untyped_storage().nbytes() and not any(map(written_by, lying))


def _measure(
    graph_module: fx.GraphModule, value: _Value, position: dict[fx.Node, int], used: Iterable[int], folder: str
) -> None:
    """Tell how much of a value is in memory where loops use it, and where operators do, which are at ``used``."""
    for node in {value.node, *value.uses}:
        if node.op == "call_module":
            outputs = value.outputs if node is value.node else ()
            loop = loop_of(graph_module, node).with_homes(value.uses[node], outputs, folder)
            value.mapped[position[node]] = mapped_bytes(node, loop)
            value.moved += loop.bytes_moved([each.meta["val"] for each in node.args], node.meta["val"])
    for at in used:
        value.mapped[at] = value.bytes
        value.moved += value.bytes


def _rewritten(graph_module: fx.GraphModule, chosen: list[_Value], folder: str) -> fx.GraphModule:
    keys, loops = {value.key for value in chosen}, dict[str, nn.Module]()
    makers = {value.node for value in chosen if value.node.op == "call_function"}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph_module.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.op == "call_module":
            loop = loop_of(graph_module, node)
            inputs = {at for value in chosen for at in value.uses.get(node, ())}
            outputs = {at for value in chosen if value.node is node for at in value.outputs}
            if inputs or outputs or loop.moves:
                loops[str(node.target)] = loop.with_homes(inputs, outputs, folder)
        elif node in makers:
            env[node] = graph.call_function(send_home, (env[node], folder))
            env[node].meta = dict(node.meta)
        if keys & dict(touched(node)).keys():
            for read in node.all_input_nodes:
                if keys & memories(read.meta["val"]):
                    graph.call_function(give_back, (env[read],)).meta = {**node.meta, "val": None}
    return rebuilt(graph_module, graph, "Spilling", loops)
