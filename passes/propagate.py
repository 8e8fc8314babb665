"""Propagation: fill in the fake value of every node of a graph, from its placeholders' and weights' on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}


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
    value = node.target(*args, **kwargs)
    return _restrided(value, node.target, args, kwargs) if node.target in VIEWS and 1 in value.shape else value


def _restrided(value: torch.Tensor, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """A fake view with the strides that the real one has in dimensions of size 1: kernels choose layouts by them."""
    source, *rest = args
    with unset_fake_temporarily():
        meta = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        stride = target(meta, *rest, **kwargs).stride()
    return value if stride == value.stride() else value.as_strided(value.shape, stride)


def propagate(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> None:
    """Set ``meta["val"]`` of the ``call_function`` nodes (all, or those given in schedule order)."""
    with torch.no_grad(), fake_mode_of(graph):
        for node in graph.nodes if nodes is None else nodes:
            if node.op == "call_function":
                node.meta["val"] = evaluate(node)
