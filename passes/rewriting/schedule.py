"""Schedule: compute what makes memory grow as late as what reads it allows.

Every node that makes more bytes than it is the last to need is moved to just before the first node that reads it; or
every one that makes as many, so that what it reads can be made later, too. The graph keeps its own order where neither
lowers its peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from math import inf

from torch import fx

from fxstream.passes.graph.capture import rebuilt
from fxstream.passes.graph.effects import draws, writes
from fxstream.passes.graph.liveness import Liveness, analyze


def schedule(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph module in the order of the lowest peak; the same one where that is its own.

    A graph that writes to tensors is left as it is: its order has a meaning. So has that of random draws, which stay
    where they are while others move.
    """
    liveness = analyze(graph_module)
    if any(writes(node) for node in liveness.schedule):
        return graph_module
    orders: list[Sequence[fx.Node]] = [liveness.schedule, _late(liveness, least=1), _late(liveness, least=0)]
    order = min(orders, key=lambda order: max(_in_order(liveness, order).live_bytes(), default=0))
    return graph_module if order is orders[0] else _reordered(graph_module, order)


def _in_order(liveness: Liveness, order: Sequence[fx.Node]) -> Liveness:
    """The liveness of the same nodes in another order."""
    position = {node: index for index, node in enumerate(order)}
    transient = dict(zip(liveness.schedule, liveness.transient, strict=True))
    death: dict[int, int] = {}
    for index, node in enumerate(order):
        last = max((position.get(user, len(order)) for user in node.users), default=index)
        for storage in liveness.of[node]:
            death[storage] = max(death.get(storage, 0), last)
    storages = tuple(
        replace(storage, birth=position[storage.node], death=death[index])
        for index, storage in enumerate(liveness.storages)
    )
    return Liveness(tuple(order), storages, liveness.of, tuple(transient[node] for node in order))


def _late(liveness: Liveness, least: int) -> list[fx.Node]:
    """Each node just before the first that reads it, if it makes ``least`` bytes more than it is the last to need."""
    place: dict[fx.Node, tuple[float, ...]] = {node: (at, inf) for at, node in enumerate(liveness.schedule)}
    moved = count()
    for at, node in reversed(list(enumerate(liveness.schedule))):
        if node.users and not draws(node) and _growth(liveness, at, node) >= least:
            places = [place[user] for user in node.users if user.op != "output"]
            *first, _ = min(places, default=(len(place), inf))
            place[node] = (*first, next(moved), inf)  # before the first user, and after what is there already
    return sorted(liveness.schedule, key=place.__getitem__)


def _growth(liveness: Liveness, index: int, node: fx.Node) -> int:
    made = sum(liveness.storages[s].bytes for s in liveness.of[node] if liveness.storages[s].birth == index)
    read = {s for each in node.all_input_nodes for s in liveness.of.get(each, ())}
    return made - sum(liveness.storages[s].bytes for s in read if liveness.storages[s].death == index)


def _reordered(graph_module: fx.GraphModule, order: Sequence[fx.Node]) -> fx.GraphModule:
    graph, source = fx.Graph(), graph_module.graph
    env: dict[fx.Node, fx.Node] = {}
    outside = [node for node in source.nodes if node.op in ("placeholder", "get_attr")]
    for node in (*outside, *order, source.output_node()):
        env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(graph_module, graph, "Scheduled")
