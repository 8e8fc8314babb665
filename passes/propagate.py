"""Propagation: fill in the fake value of every node of a graph, from its placeholders' and weights' on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._prims_common import suggest_memory_format
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
    if node.target in VIEWS and 1 in value.shape:
        return _restrided(value, args[0], lambda meta: node.target(meta, *args[1:], **kwargs))
    if node.target is aten.group_norm.default and 1 in value.shape and value.device.type == "cpu":
        return _restrided(value, args[0], _normed)
    return value


def _restrided(value: torch.Tensor, source: torch.Tensor, real: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A fake value with the strides that the real one has in dimensions of size 1: kernels choose layouts by them."""
    stride = _on_meta(source, real).stride()
    return value if stride == value.stride() else value.as_strided(value.shape, stride)


def _on_meta(source: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What torch's own kernels make of a tensor of that layout, outside of any fake mode."""
    with unset_fake_temporarily():
        return function(torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta"))


def _normed(input: torch.Tensor) -> torch.Tensor:
    """Of the layout that a group norm's kernel gives its result."""
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def propagate(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> None:
    """Set ``meta["val"]`` of the ``call_function`` nodes (all, or those given in schedule order)."""
    with torch.no_grad(), fake_mode_of(graph):
        for node in graph.nodes if nodes is None else nodes:
            if node.op == "call_function":
                node.meta["val"] = evaluate(node)


def propagate_layouts(graph_module: fx.GraphModule) -> None:
    """Propagate through what was traced without the backends that choose the layouts of convolutions.

    ``torch.export`` turns them off while it traces. Where the true layout has no such view, it is of a copy, as the
    reshape that it was traced from would have made.
    """
    graph = graph_module.graph
    mode = fake_mode_of(graph)
    FakeTensorMode.cache_clear()  # it does not know which backends were on
    if mode.shape_env is not None:
        mode.shape_env.fake_tensor_cache.clear()
    with torch.no_grad(), mode:
        for node in graph.nodes:
            if node.target is aten.view.default and not _has_view(*node.args):
                _copy_first(node)
            if node.op == "call_function":
                node.meta["val"] = evaluate(node)
    graph_module.recompile()


def _has_view(source: fx.Node, size: Any) -> bool:
    try:
        _on_meta(source.meta["val"], lambda meta: meta.view(size))
    except RuntimeError:
        return False
    return True


def _copy_first(view: fx.Node) -> None:
    source: Any = view.args[0]
    with view.graph.inserting_before(view):
        copy = view.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copy.meta = {**view.meta, "val": evaluate(copy)}
    view.replace_input_with(source, copy)
