"""Cut: the values at which a graph is split into what a skipped step computes and what it takes from an earlier step.

A cut is named by the path of a module (what leaves it), by a node, or found:

- ``paper``: what leaves the last block.
- ``deepcache``: the deep operand of the concatenation that joins a skip connection, counted by ``branch`` from the
  output on.
- ``auto``: the fewest bytes such that the output still depends on the current latent and on the current timestep, and a
  skipped step computes at most a share ``keep`` of the model's FLOPs. What lies on the cheapest way from either to the
  output is computed, and so may be the end of the graph, as far as ``keep`` goes; the rest comes from the cut, which is
  a minimum cut of the dataflow. Of several with equal bytes it is the one that leaves most to be computed from the
  current latent and timestep: what follows from the cut's values alone is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import networkx as nx
import torch
from torch import fx

from fxstream.passes.graph.capture import module_path
from fxstream.passes.graph.flops import flops
from fxstream.passes.graph.liveness import bytes_of

aten = torch.ops.aten

PRESETS = ("auto", "paper", "deepcache")
NEGLIGIBLE = 1e-4
"""Nodes of less than this share of the FLOPs, such as an embedding's, are not worth bytes."""

CONCATENATIONS = {aten.cat.default, aten.concat.default}


def find_cut(
    graph_module: fx.GraphModule,
    where: str,
    latent: fx.Node,
    timestep: fx.Node,
    *,
    branch: int = 0,
    keep: float = 0.2,
) -> tuple[fx.Node, ...]:
    """The values of a cut: ``where`` is a preset, a module path or a node's name.

    ``latent`` and ``timestep`` are the placeholders of the current latent and timestep. Raises ``ValueError`` where
    there is no such cut.
    """
    graph = graph_module.graph
    if where == "paper":
        return _last_block(graph, latent)
    if where == "deepcache":
        return _skip_connection(graph, latent, branch)
    if where == "auto":
        return _least(graph_module, latent, timestep, keep)
    named = [node for node in graph.nodes if node.name == where and node.op == "call_function"]
    return tuple(named) or _leaving(graph, where)


def first_joint(graph_module: fx.GraphModule, latent: fx.Node, timestep: fx.Node) -> fx.Node:
    """The first value that depends on both the latent and the timestep: cheap, early, and it moves as the model does.

    In a UNet it is the first convolution's result with the timestep's embedding added, in a diffusion transformer the
    first block's modulated input.
    """
    graph = graph_module.graph
    both = _descendants([latent]) & _descendants([timestep])
    for node in graph.nodes:
        if node in both and node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            return node
    raise ValueError("no value of the model depends on both the latent and the timestep: there is nothing to watch")


def _leaving(graph: fx.Graph, path: str) -> tuple[fx.Node, ...]:
    """The values that a module hands to the rest of the model."""
    prefix = path + "."
    inside = {node for node in graph.nodes if module_path(node) == path or module_path(node).startswith(prefix)}
    leaving = [
        node
        for node in graph.nodes
        if node in inside and node.op == "call_function" and any(user not in inside for user in node.users)
    ]
    tensors = tuple(node for node in leaving if isinstance(node.meta["val"], torch.Tensor))
    if not tensors:
        paths = sorted({".".join(module_path(node).split(".")[:2]) for node in graph.nodes if module_path(node)})
        raise ValueError(
            f"there is no cut {path!r}: it is none of {', '.join(PRESETS)}, no node of the captured graph and no path "
            f"of a module whose result is used. Among the model's modules are {', '.join(paths[-8:])}"
        )
    return tensors


def _last_block(graph: fx.Graph, latent: fx.Node) -> tuple[fx.Node, ...]:
    """What leaves the last block: a member of a list of modules that has modules of its own."""
    dependent = _descendants([latent])
    for node in reversed(graph.nodes):
        names = module_path(node).split(".")
        number = next((index for index, name in enumerate(names) if name.isdecimal()), None)
        if node in dependent and number is not None and number + 1 < len(names):
            return _leaving(graph, ".".join(names[: number + 1]))
    raise ValueError("the model has no list of blocks to cut after: name a module's path, or use cut='auto'")


def _skip_connection(graph: fx.Graph, latent: fx.Node, branch: int) -> tuple[fx.Node, ...]:
    """The deep operand of a concatenation whose other operand it was computed from."""
    dependent = _descendants([latent])
    joins = []
    for node in reversed(graph.nodes):
        if node.target not in CONCATENATIONS or node not in dependent:
            continue
        operands = [operand for operand in node.args[0] if operand in dependent]
        deep = [x for x in operands if any(y is not x and x in _descendants([y]) for y in operands)]
        if len(operands) == 2 and len(deep) == 1:
            joins.append(deep[0])
    if not joins:
        raise ValueError("the model has no skip connection that a concatenation joins: use cut='auto' or 'paper'")
    if not 0 <= branch < len(joins):
        raise ValueError(f"branch {branch} of cut='deepcache' does not exist: the model has {len(joins)}, from 0 on")
    return (joins[branch],)


def _least(graph_module: fx.GraphModule, latent: fx.Node, timestep: fx.Node, keep: float) -> tuple[fx.Node, ...]:
    graph = graph_module.graph
    cost = flops(graph_module)
    total = sum(cost.values())
    allowed = keep * total
    needed = {node for node in _ancestors(graph.output_node()) if node.op == "call_function"}
    kept = _cheapest_way(graph, latent, cost) | _cheapest_way(graph, timestep, cost)
    spent = sum(cost[node] for node in kept)
    if spent > allowed:
        raise ValueError(
            f"no cut leaves the output dependent on the latent and the timestep at {keep:.0%} of the model's FLOPs: "
            f"the cheapest way takes {spent / total:.0%}. Raise keep, or name a module's path"
        )
    # What costs next to nothing may be computed again, and the graph's end as far as `keep` goes; the rest is skipped.
    costly = [node for node in graph.nodes if node in needed and node not in kept and cost[node]]
    costly.sort(key=lambda node: cost[node] < NEGLIGIBLE * total)
    skipped = set()
    for node in reversed(costly):
        spent += cost[node]
        if spent > allowed:
            skipped.add(node)
    if not skipped:
        raise ValueError(f"keep={keep} leaves nothing to skip: give a smaller share of the model's FLOPs")
    return _advanced(graph, _minimum_cut(graph, needed, skipped, kept), (latent, timestep))


def _minimum_cut(
    graph: fx.Graph, needed: set[fx.Node], skipped: set[fx.Node], kept: set[fx.Node]
) -> tuple[fx.Node, ...]:
    """The values of fewest bytes that separate ``skipped`` from the output and from ``kept``.

    The flow runs from the output, so that of equal cuts the one found lies furthest from the output.
    """
    flow = nx.DiGraph()
    output = graph.output_node()
    for node in needed:
        _add_value(flow, node)
        if node in skipped:
            flow.add_edge((node, "made"), "skipped")
        for user in node.users:
            # What is computed in a skipped step reads its operands there.
            if user is output:
                flow.add_edge("kept", (node, "read"))
            elif user in needed:
                flow.add_edge((user, "made"), (node, "read"))
    for node in kept:
        flow.add_edge("kept", (node, "made"))
    _, (reading, _) = nx.minimum_cut(flow, "kept", "skipped")
    return tuple(
        node for node in graph.nodes if node in needed and (node, "read") in reading and (node, "made") not in reading
    )


def _advanced(graph: fx.Graph, cut: tuple[fx.Node, ...], current: tuple[fx.Node, fx.Node]) -> tuple[fx.Node, ...]:
    """The values of fewest bytes, nearest to the output, that follow from a cut's and from nothing ``current``.

    A skipped step would compute them from the same numbers as the last full step did.
    """
    output = graph.output_node()
    computed = _reached([output], lambda node: [] if node in cut else node.all_input_nodes)
    fresh = _reached(current, lambda node: [user for user in node.users if user in computed and user not in cut])
    follows = _reached(cut, lambda node: [user for user in node.users if user in computed]) - fresh
    flow = nx.DiGraph()
    for node in follows:
        _add_value(flow, node)
        if node in cut:
            flow.add_edge("cut", (node, "read"))
        for user in node.users:
            if user in computed:
                flow.add_edge((node, "made"), (user, "read") if user in follows else "rest")
    _, (_, reading) = nx.minimum_cut(flow, "cut", "rest")
    return tuple(
        node for node in graph.nodes if node in follows and (node, "made") in reading and (node, "read") not in reading
    )


def _add_value(flow: nx.DiGraph, node: fx.Node) -> None:
    """A node as an edge of its bytes: to cut it is to hold its value."""
    held = bytes_of(node.meta["val"]) if isinstance(node.meta["val"], torch.Tensor) else float("inf")
    flow.add_edge((node, "read"), (node, "made"), capacity=max(held, 1))


def _cheapest_way(graph: fx.Graph, start: fx.Node, cost: Mapping[fx.Node, int]) -> set[fx.Node]:
    """The nodes on a way from an input to the output that takes the fewest FLOPs, then the fewest nodes."""
    output = graph.output_node()
    best: dict[fx.Node, tuple[int, int]] = {start: (0, 0)}
    before: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:  # a graph's order is a topological one
        reached = [(best[read], index) for index, read in enumerate(node.all_input_nodes) if read in best]
        if not reached:
            continue
        (spent, length), index = min(reached)
        best[node] = (spent + cost.get(node, 0), length + 1)
        before[node] = node.all_input_nodes[index]
    if output not in before:
        raise ValueError(f"the model's output does not depend on its input {start.name}")
    way = set()
    node = before[output]
    while node is not start:
        way.add(node)
        node = before[node]
    return way


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return _reached(nodes, lambda node: node.users)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    return _reached([node], lambda node: node.all_input_nodes)


def _reached(nodes: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    pending = list(nodes)
    found = set(pending)
    while pending:
        for other in step(pending.pop()):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found
