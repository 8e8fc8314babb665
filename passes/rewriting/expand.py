"""Expand: some nodes of a graph become several that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxstream.passes.graph.capture import rebuilt
from fxstream.passes.graph.propagate import evaluate, fake_mode_of

Nodes = Mapping[fx.Node, fx.Node]


def expand(
    graph_module: fx.GraphModule, parts: Mapping[fx.Node, Callable[[fx.Graph, Nodes], fx.Node]]
) -> fx.GraphModule:
    """A graph module in which some nodes are computed in parts; the same one where there are none.

    Each node's function appends the parts to the new graph and returns the last, given the new nodes by the old. The
    last takes the node's own fake value, in which the views of it lie, and has to have its layout.
    """
    if not parts:
        return graph_module
    graph, source = fx.Graph(), graph_module.graph
    env: dict[fx.Node, fx.Node] = {}
    with torch.no_grad(), fake_mode_of(source):
        for node in source.nodes:
            if node in parts:
                env[node] = parts[node](graph, env)
                env[node].meta["val"] = node.meta["val"]
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(graph_module, graph, "Expanded")


def derived(origin: fx.Node, graph: fx.Graph, part: str, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node at the end of a graph that computes a part of what another node did; call under its fake mode.

    ``meta["origin"]`` is the other's name and ``meta["part"]`` the part's.
    """
    node = graph.create_node("call_function", target, args, kwargs, name=f"{origin.name}_{part}")
    node.meta = {"origin": origin.name, **origin.meta, "part": part}
    node.meta["val"] = evaluate(node)
    return node
