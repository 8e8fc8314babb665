"""Composites: operators put as what they do to memory, where a traced graph doesn't say it.

A composite operator that may return a view of what it reads (a dropout that drops nothing, an einsum that transposes)
has no word of it in its schema, and a graph made functional would lose what is written through the view. Before it is
made so, such operators are replaced by what they are made of. Afterwards a custom operator that writes is a call on
copies: it becomes a copy and a call of the operator itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2_dense
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from fxstream.passes.graph.effects import memories, written_by
from fxstream.passes.graph.propagate import fake_mode_of

aten = torch.ops.aten
AUTO_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2


def open_composites(graph_module: fx.GraphModule) -> None:
    """Replace what has to be of a traced graph that is not functional yet, in place."""
    graph = graph_module.graph
    changed = {key for node in graph.nodes for read in written_by(node) for key in memories(read.meta["val"])}
    for node in list(graph.nodes):
        if node.target is aten.bernoulli.p:
            _draw_into(node, aten.bernoulli_.float, _contiguous(node.meta["val"]))
        elif isinstance(node.target, OpOverload) and _has_to(node, node.target, changed):
            inline(node, node.target)
    graph_module.recompile()


def _has_to(node: fx.Node, target: OpOverload, changed: set[int]) -> bool:
    if torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return True
    if any(argument.alias_info is not None for argument in target._schema.arguments):
        return False
    shared = changed.intersection(memories(node.meta.get("val")))
    return any(not shared.isdisjoint(memories(read.meta.get("val"))) for read in node.all_input_nodes)


def open_libraries(graph_module: fx.GraphModule) -> None:
    """Replace composite operators of other libraries than torch by what they are made of, in place.

    ``torch.export`` keeps them. One that writes to what it makes stays whole.
    """
    for node in list(graph_module.graph.nodes):
        if isinstance(node.target, OpOverload) and node.target.namespace != "aten" and node.target._can_decompose():
            inline(node, node.target, unless=_writes)
    graph_module.recompile()


def _writes(graph: fx.Graph) -> bool:
    return any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in graph.nodes)


def write_in_place(graph_module: fx.GraphModule) -> None:
    """Replace what of a functional graph has to write after all, in place: custom operators, and some draws."""
    for node in list(graph_module.graph.nodes):
        if node.target is AUTO_FUNCTIONALIZED:
            _write(node)
        elif node.target is aten.normal_functional.default and not _is_dense(node.args[0].meta["val"]):
            _draw_into(node, aten.normal_.default, node.args[0].meta["val"])
        elif node.target is aten.bernoulli.p and not node.args[0].meta["val"].is_contiguous():
            _draw_into(node, aten.bernoulli_.float, node.args[0].meta["val"])
    graph_module.recompile()


def _write(node: fx.Node) -> None:
    """Call a custom operator on what it writes to, or on copies of what is the caller's or is read later as it was."""
    graph = node.graph
    bases: Any = node.kwargs["_all_bases"]
    nodes = list(graph.nodes)
    read = {key for each in graph.find_nodes(op="placeholder") for key in memories(each.meta["val"])}
    for later in nodes[nodes.index(node) + 1 :]:
        read.update(key for each in later.all_input_nodes if each is not node for key in memories(each.meta["val"]))
    kept = tuple(i for i, base in enumerate(bases) if not read.isdisjoint(memories(base.meta["val"])))
    inline(node, partial(auto_functionalized_v2_dense, _only_clone_these_bases=kept))


def _is_dense(value: torch.Tensor) -> bool:
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return last + 1 == value.numel()


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    """What a functional bernoulli draws into, of whatever layout its input is; one in place draws into its input's."""
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _draw_into(node: fx.Node, target: OpOverload, value: torch.Tensor) -> None:
    """Draw in place, into memory of the layout that the model draws into, by which the kernel goes.

    What torch makes of a draw in place is one of dense memory, or of contiguous memory.
    """
    with node.graph.inserting_before(node):
        layout = [*value.shape], [*value.stride()]
        made = node.graph.call_function(
            aten.empty_strided.default, layout, {"dtype": value.dtype, "device": value.device}
        )
    made.meta = {**node.meta, "val": value}
    node.target, node.args = target, (made, *node.args[1:])


def inline(node: fx.Node, function: Callable[..., Any], unless: Callable[[fx.Graph], bool] | None = None) -> None:
    """Replace a call by the operators that a function makes of it, ``unless`` those are to be left alone."""
    graph, reads = node.graph, node.all_input_nodes

    def flat(*values: Any) -> Any:
        env = dict(zip(reads, values, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
        return function(*args, **kwargs)

    with torch.no_grad(), fake_mode_of(graph):
        traced = make_fx(flat)(*(read.meta["val"] for read in reads)).graph
    if unless is not None and unless(traced):
        return
    env: dict[fx.Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), reads, strict=True))
    with graph.inserting_before(node):
        for made in traced.nodes:
            if made.op == "call_function":
                env[made] = graph.node_copy(made, env.__getitem__)
                env[made].meta = {**node.meta, "val": made.meta.get("val")}
    result: Any = fx.map_arg(traced.output_node().args[0], env.__getitem__)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(result[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
