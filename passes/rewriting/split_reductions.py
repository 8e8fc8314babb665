"""Split reductions: of a large tensor over several dimensions, first over the last of them, then over all.

Whole, a reduction can't be cut along what it reduces: a mean over pixels not along rows. Its first part can be cut
along the dimensions that it leaves, and what it makes is so small that the second may run whole. So the norms that a
model writes by hand are cut, and gates of channels by their mean. Each part's ``meta["origin"]`` is the node's name.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch._ops import OpOverload

from fxstream.passes.graph.liveness import bytes_of
from fxstream.passes.operators.axes import Call
from fxstream.passes.operators.common import dims, source
from fxstream.passes.rewriting.expand import Nodes, derived, expand

aten = torch.ops.aten

SMALLER = 16
"""The first part reduces so many elements to one, or all but one dimension."""

MEANS = {aten.mean.dim, aten.mean.default}
SUMS = {aten.sum.dim_IntList, aten.sum.default}
VARIANCES = {aten.var.dim, aten.var.correction}
POOLS = {aten.adaptive_avg_pool2d.default: 2, aten.adaptive_avg_pool3d.default: 3}
"""Means, too, where they leave one pixel; and over how many dimensions."""

REDUCTIONS = {*MEANS, *SUMS, *VARIANCES, *POOLS, aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default}
BY_DIM = {aten.sum.default: aten.sum.dim_IntList} | dict.fromkeys((aten.mean.default, *POOLS), aten.mean.dim)
"""The operators that take dimensions, for those that don't."""


class Reduction(NamedTuple):
    """A reduction over some dimensions, and those of them that its first part reduces."""

    input: fx.Node
    dims: list[int]
    first: list[int]
    keepdim: bool
    arguments: dict[str, Any]


def split_reductions(graph_module: fx.GraphModule, least: float) -> fx.GraphModule:
    """A graph module whose reductions of ``least`` bytes and more are split; the same one where it has none."""
    found = {node: each for node in graph_module.graph.nodes if (each := _reduction_of(node, least)) is not None}
    parts = {
        node: partial(_variance if node.target in VARIANCES else _split, node, each) for node, each in found.items()
    }
    return expand(graph_module, parts)


def _reduction_of(node: fx.Node, least: float) -> Reduction | None:
    """A node's reduction; None where it is none, small, over one dimension, or would be less exact in parts."""
    if node.target not in REDUCTIONS:
        return None
    call = Call(node.target, node.args, node.kwargs, node.meta["val"])
    given, read = call.arguments, cast(fx.Node, source(call))
    input = read.meta["val"]
    over = _reduced(node.target, given, input.dim())
    wide = [dim for dim in over if input.shape[dim] > 1]
    if len(wide) < 2 or bytes_of(input) < least or not _is_exact(node.target, given, input):
        return None
    first = wide[-1:]
    while len(first) < len(wide) - 1 and prod(input.shape[dim] for dim in first) < SMALLER:
        first = wide[-len(first) - 1 :]
    return Reduction(read, over, first, given.get("keepdim", node.target in POOLS), given)


def _reduced(target: OpOverload, given: dict[str, Any], rank: int) -> list[int]:
    """The dimensions that are reduced to one element."""
    if target in POOLS:
        return list(range(rank))[-POOLS[target] :] if set(given["output_size"]) == {1} else []
    return sorted(dims(given.get("dim"), rank))


def _is_exact(target: OpOverload, given: dict[str, Any], input: torch.Tensor) -> bool:
    """Whether two parts are as good as the whole, and lie in memory as it does."""
    if target in POOLS:
        return input.is_contiguous()
    if target is aten.linalg_vector_norm.default:
        return bool(given["ord"] != 0)  # which counts, and then would count the counts
    if target in VARIANCES and _correction(given) > 1:
        return False
    # of these torch keeps the partial results of reduced types in float32, without a copy of the input
    kept_exact = (target in SUMS and given["dtype"] is None) or target in VARIANCES
    return not (kept_exact and input.is_floating_point() and input.dtype.itemsize < 4)


def _split(node: fx.Node, found: Reduction, graph: fx.Graph, env: Nodes) -> fx.Node:
    input = env[found.input]
    operator: Any = node.target
    target, value = BY_DIM.get(operator, operator), node.meta["val"]
    order = [found.arguments["ord"]] if "ord" in found.arguments else []
    kind = found.arguments.get("dtype")
    if target in (aten.mean.dim, aten.sum.dim_IntList) and value.is_floating_point():
        kind = torch.promote_types(kind or input.meta["val"].dtype, torch.float32)
    wanted = {} if kind is None else {"dtype": kind}
    part = derived(node, graph, "part", target, input, *order, found.first, True, **wanted)
    total = derived(node, graph, "statistics", target, part, *order, found.dims, found.keepdim)
    if total.meta["val"].dtype == value.dtype:
        return total
    return derived(node, graph, "converted", aten._to_copy.default, total, dtype=value.dtype)


def _variance(node: fx.Node, found: Reduction, graph: fx.Graph, env: Nodes) -> fx.Node:
    """The mean of variances over equally many elements each, and the variance of their means."""
    input = env[found.input]
    given, shape = found.arguments, input.meta["val"].shape
    part = derived(node, graph, "part", aten.var.correction, input, found.first, correction=0, keepdim=True)
    means = derived(node, graph, "means", aten.mean.dim, input, found.first, True)
    within = derived(node, graph, "within", aten.mean.dim, part, found.dims, found.keepdim)
    between = derived(
        node, graph, "between", aten.var.correction, means, found.dims, correction=0, keepdim=found.keepdim
    )
    total = derived(node, graph, "statistics", aten.add.Tensor, within, between)
    count = prod(shape[dim] for dim in found.dims)
    return derived(node, graph, "corrected", aten.mul.Tensor, total, count / (count - _correction(given)))


def _correction(given: dict[str, Any]) -> float:
    correction = given.get("correction", given.get("unbiased"))
    return 1 if correction is None else float(correction)
