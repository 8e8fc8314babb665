"""Schedule: compute what makes memory grow as late as what reads it allows.

Every node that makes more bytes than it is the last to need is moved to just before the first node that reads it. The
graph keeps its own order where that does not lower its peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    late = _late(liveness)
    peaks = [max(each.live_bytes(), default=0) for each in (liveness, _in_order(liveness, late))]
    return _reordered(graph_module, late) if peaks[1] < peaks[0] else graph_module


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


def _reordered(graph_module: fx.GraphModule, order: Sequence[fx.Node]) -> fx.GraphModule:
    graph, source = fx.Graph(), graph_module.graph
    env: dict[fx.Node, fx.Node] = {}
    outside = [node for node in source.nodes if node.op in ("placeholder", "get_attr")]
    for node in (*outside, *order, source.output_node()):
        env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(graph_module, graph, "Scheduled")
