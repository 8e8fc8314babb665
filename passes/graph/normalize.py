"""Normalize: drop what a captured graph computes for nothing.

Assertions, copies that change neither layout nor dtype, multiplication and division by one, pads of no width, dead
code; operators that read a tensor only for its dtype are put so that they don't, and a batch norm of which only the
first result is used as the operator that has no other; of a view that is assigned to, only what it shows is copied.
Every change leaves each remaining value as it was, to the bit; and to the stride, such views apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxstream.passes.graph.effects import stays, writes, written_by
from fxstream.passes.graph.liveness import storages_of
from fxstream.passes.graph.propagate import propagate

aten = torch.ops.aten

COPIES = {aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default, aten.contiguous.default}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
IDENTITIES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
LIKE = {
    aten.rand_like.default: aten.rand.default,
    aten.randn_like.default: aten.randn.default,
    aten.randint_like.default: aten.randint.default,
    aten.randint_like.low_dtype: aten.randint.low,
    aten.rand_like.generator: aten.rand.generator,
    aten.randn_like.generator: aten.randn.generator,
    aten.randint_like.generator: aten.randint.generator,
    aten.randint_like.low_generator_dtype: aten.randint.low_generator,
}
"""Draws of which a tensor tells the shape, and what draws the same of a shape."""

SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}
STORAGE_COPIES = {*SCATTERS, aten.diagonal_scatter.default, aten.copy.default}
"""Operators that copy the whole storage that their first argument lies in."""

UNIT_SCALES = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}


def normalize(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Normalize a captured graph in place and fill in its fake values anew."""
    graph = graph_module.graph
    returned, changed = _returned(graph), _changed(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        _forget_kind(node)
        _forget_results(node)
        if copies_more(node.target, node.args):
            with graph.inserting_before(node):
                shown = graph.call_function(aten.clone.default, node.args[:1])
            shown.meta = {**node.meta, "val": node.args[0].meta["val"]}
            node.update_arg(0, shown)
        if _is_assertion(node):
            graph.erase_node(node)
        elif _is_identity(node) and not _must_be_another(node, returned, changed):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(stays)
    propagate(graph)
    graph_module.recompile()
    return graph_module


def copies_more(target: Any, args: Any) -> bool:
    """Whether a call copies more than its first argument, a view, shows of a storage."""
    if target not in STORAGE_COPIES:
        return False
    value = args[0].meta["val"]
    return any(size > value.numel() * value.element_size() for _, size in storages_of(value))


def _forget_kind(node: fx.Node) -> None:
    """Let a node not read a tensor of which it needs the dtype alone, and which would be held for it."""
    if node.target is aten.type_as.default:
        value = node.meta["val"]
        node.target, node.args = aten._to_copy.default, node.args[:1]
        node.kwargs = {"dtype": value.dtype, "device": value.device}
    elif node.target in LIKE and _is_plain(node.meta["val"]):
        value, generator = node.meta["val"], node.kwargs.get("generator")
        node.target, node.args = LIKE[node.target], (*node.args[1:], list(value.shape))
        node.kwargs = {"dtype": value.dtype, "device": value.device} | ({"generator": generator} if generator else {})
    elif node.target in SCATTERS:  # an assignment to a part: what is assigned, converted to the part's dtype anyway
        base, part, *where = node.args
        if part.target is aten.copy.default and part.args[1].meta["val"].shape == part.meta["val"].shape:
            node.args = (base, part.args[1], *where)


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor lies in memory as one of its shape does that is made without a model of its layout."""
    return value.stride() == torch.empty(value.shape, device="meta").stride()


def _forget_results(node: fx.Node) -> None:
    """Let a batch norm by running statistics return what it normalizes, and not the statistics it didn't take."""
    batch_norm = node.target is aten._native_batch_norm_legit_no_training.default
    if batch_norm and all(user.args[1] == 0 for user in node.users):
        *operands, momentum, eps = node.args
        node.target, node.args = aten.batch_norm.default, (*operands, False, momentum, eps, False)
        node.meta["val"] = node.meta["val"][0]
        for user in list(node.users):
            user.replace_all_uses_with(node)
            user.graph.erase_node(user)


def _is_assertion(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and not target._schema.returns and not node.users and not writes(node)


def _is_identity(node: fx.Node) -> bool:
    if node.target in IDENTITIES:
        return True
    if node.target in COPIES or (node.target in PADS and _pads_nothing(*node.args)):
        return _same_layout(node)
    if node.target in UNIT_SCALES:
        factor = node.args[1]
        return isinstance(factor, (int, float)) and factor == 1 and _same_layout(node)
    return False


def _pads_nothing(input: Any, widths: Any, *rest: Any) -> bool:
    return not any(widths)


def _same_layout(node: fx.Node) -> bool:
    source, value = node.args[0].meta["val"], node.meta["val"]
    return (
        source.dtype == value.dtype
        and source.device == value.device
        and source.shape == value.shape
        and source.stride() == value.stride()
        and (source.is_conj(), source.is_neg()) == (value.is_conj(), value.is_neg())
    )


def _returned(graph: fx.Graph) -> set[int]:
    """Storages of the results."""
    return {key for node in graph.output_node().all_input_nodes for key, _ in storages_of(node.meta["val"])}


def _changed(graph: fx.Graph) -> set[int]:
    """Storages that the graph writes to."""
    return {key for node in graph.nodes for read in written_by(node) for key, _ in storages_of(read.meta["val"])}


def _must_be_another(node: fx.Node, returned: set[int], changed: set[int]) -> bool:
    """Whether a copy has to stay: a result lies in it, or it or what it copies is written to."""
    source, made = ({key for key, _ in storages_of(each.meta["val"])} for each in (node.args[0], node))
    return source != made and not ((source | made).isdisjoint(changed) and made.isdisjoint(returned - source))
