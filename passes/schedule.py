"""Schedule: put a graph's nodes in an order in which less is live at once.

Two orders are tried, and the graph keeps its own where neither lowers its peak: every node as late as what reads it
allows, where that holds fewer bytes; and, node by node, that which adds least to what is live.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import fx

from fxstream.passes.capture import rebuilt
from fxstream.passes.liveness import Liveness, analyze
from fxstream.passes.normalize import is_impure


def schedule(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph module in the order of the lowest peak; the same one where that is its own.

    A graph that writes to its inputs or buffers is left as it is: its order has a meaning.
    """
    liveness = analyze(graph_module)
    if any(is_impure(node) for node in liveness.schedule):
        return graph_module
    own = list(liveness.schedule)
    best = min((own, _late(liveness), _greedy(liveness)), key=lambda order: _peak_bytes(liveness, order))
    return graph_module if best is own else _reordered(graph_module, best)


def _peak_bytes(liveness: Liveness, order: Sequence[fx.Node]) -> int:
    """The peak of the schedule in another order."""
    position = {node: index for index, node in enumerate(order)}
    transient = dict(zip(liveness.schedule, liveness.transient, strict=True))
    birth: dict[int, int] = {}
    death: dict[int, int] = {}
    for index, node in enumerate(order):
        last = max((position.get(user, len(order)) for user in node.users), default=index)
        for storage in liveness.of[node]:
            birth.setdefault(storage, index)
            death[storage] = max(death.get(storage, 0), last)
    changes = [0] * (len(order) + 2)
    for storage, index in birth.items():
        changes[index] += liveness.storages[storage].bytes
        changes[death[storage] + 1] -= liveness.storages[storage].bytes
    live = accumulate(changes)
    return max((held + transient[node] for held, node in zip(live, order, strict=False)), default=0)


def _late(liveness: Liveness) -> list[fx.Node]:
    """Each node just before the first that reads it, if it makes more bytes than it is the last to need."""
    order = list(liveness.schedule)
    for index, node in reversed(list(enumerate(liveness.schedule))):
        if _grows(liveness, index, node) and node.users:
            order.remove(node)
            places = [order.index(user) for user in node.users if user.op != "output"]
            order.insert(min(places, default=len(order)), node)
    return order


def _grows(liveness: Liveness, index: int, node: fx.Node) -> bool:
    made = sum(liveness.storages[s].bytes for s in liveness.of[node] if liveness.storages[s].birth == index)
    read = {s for each in node.all_input_nodes for s in liveness.of.get(each, ())}
    return made > sum(liveness.storages[s].bytes for s in read if liveness.storages[s].death == index)


def _greedy(liveness: Liveness) -> list[fx.Node]:
    """Of the nodes whose inputs are there, always the one that adds least, the earlier of two."""
    storages, position = liveness.storages, {node: index for index, node in enumerate(liveness.schedule)}
    waiting = {node: sum(each in position for each in node.all_input_nodes) for node in liveness.schedule}
    readers: list[set[fx.Node]] = [set() for _ in storages]
    for node in liveness.schedule:
        for each in node.all_input_nodes:
            for storage in liveness.of.get(each, ()):
                readers[storage].add(node)
    returned = {index for index, storage in enumerate(storages) if storage.death >= len(liveness.schedule)}
    ready = {node for node, count in waiting.items() if not count}
    order: list[fx.Node] = []

    def added(node: fx.Node) -> int:
        made = sum(storages[s].bytes for s in liveness.of[node] if storages[s].node is node)
        read = {s for each in node.all_input_nodes for s in liveness.of.get(each, ())} - returned
        return made - sum(storages[s].bytes for s in read if readers[s] == {node})

    while ready:
        node = min(ready, key=lambda each: (added(each), position[each]))
        ready.remove(node)
        order.append(node)
        for each in node.all_input_nodes:
            for storage in liveness.of.get(each, ()):
                readers[storage].discard(node)
        for user in node.users:
            if user in waiting:
                waiting[user] -= 1
                if not waiting[user]:
                    ready.add(user)
    return order


def _reordered(graph_module: fx.GraphModule, order: Sequence[fx.Node]) -> fx.GraphModule:
    graph, source = fx.Graph(), graph_module.graph
    env: dict[fx.Node, fx.Node] = {}
    outside = [node for node in source.nodes if node.op in ("placeholder", "get_attr")]
    for node in (*outside, *order, source.output_node()):
        env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(graph_module, graph, "Scheduled")
