"""Propagation: fill in the fake value of every node of a graph, from its placeholders' and weights' on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the values of a captured graph live in."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


def evaluate(node: fx.Node) -> Any:
    """The fake value of a ``call_function`` node, from its arguments' values. Call under the graph's fake mode."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda argument: argument.meta["val"])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def propagate(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> None:
    """Set ``meta["val"]`` of the ``call_function`` nodes (all, or those given in schedule order)."""
    with torch.no_grad(), fake_mode_of(graph):
        for node in graph.nodes if nodes is None else nodes:
            if node.op == "call_function":
                node.meta["val"] = evaluate(node)
