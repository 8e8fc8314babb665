"""Split norms: a norm over pixels of a large tensor as moments, statistics and a pointwise scale.

Whole, a group norm can't be cut along an axis that its statistics span: frames, where it sees them, and pixels. Its
parts can: moments are taken of each row, and the scale is pointwise. An instance norm is one with a group a channel, a
layer norm over channels and pixels one with a single group, and a weight an element. Where a plan leaves all the parts
together after all, they are fused again, unless that would raise the peak. Each part's ``meta["origin"]`` is the
norm's name.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from fxstream.passes.graph.effects import stays
from fxstream.passes.graph.liveness import analyze, bytes_of
from fxstream.passes.graph.propagate import on_meta
from fxstream.passes.machine.workspace import workspace_bytes
from fxstream.passes.operators.axes import Call
from fxstream.passes.rewriting.expand import Nodes, derived, expand
from fxstream.runtime.norm import scaled_format  # and with it the operators

aten, norm = torch.ops.aten, torch.ops.fxstream


def split_norms(graph_module: fx.GraphModule, least: float) -> fx.GraphModule:
    """A graph module whose norms over pixels of at least ``least`` bytes are split; the same one where it has none.

    Only images and videos are: of an input (N, C, L) the moments would be no smaller than a good part of it.
    """
    found = {node: each for node in graph_module.graph.nodes if (each := _norm_of(node)) is not None}
    large = {node: each for node, each in found.items() if bytes_of(node.meta["val"]) >= least}
    return expand(graph_module, {node: partial(_split, node, each) for node, each in large.items()})


class Norm(NamedTuple):
    """A norm over groups of channels and all pixels."""

    input: fx.Node
    groups: int
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float


def _norm_of(node: fx.Node) -> Norm | None:
    """A node's norm; None where it is none, takes running statistics, or where no image or video is normalized."""
    if node.target not in (aten.group_norm.default, aten.instance_norm.default, aten.layer_norm.default):
        return None
    value = node.meta["val"]
    if value.dim() <= 3 or not value.is_floating_point():
        return None
    given = Call(node.target, node.args, node.kwargs, value).arguments
    found = Norm(given["input"], value.shape[1], given["weight"], given["bias"], given["eps"])
    if value.stride() != _scaled_stride(found.input.meta["val"]):  # the norm puts channels first
        return None
    if node.target is aten.group_norm.default:
        return found._replace(groups=given["num_groups"])
    if node.target is aten.layer_norm.default:
        return found._replace(groups=1) if list(given["normalized_shape"]) == list(value.shape[1:]) else None
    return found if given["use_input_stats"] else None


def _scaled_stride(input: torch.Tensor) -> tuple[int, ...]:
    """How the scale of a norm lies."""
    return on_meta(partial(torch.empty_like, memory_format=scaled_format(input)), input).stride()


def _split(node: fx.Node, found: Norm, graph: fx.Graph, env: Nodes) -> fx.Node:
    value = node.meta["val"]
    input = env[found.input]
    weight, bias = (None if each is None else env[each] for each in (found.weight, found.bias))
    count = value.shape[1] // found.groups * value.shape[-1]
    moments = derived(node, graph, "moments", norm.group_moments.default, input, found.groups)
    statistics = derived(node, graph, "statistics", norm.group_statistics.default, moments, count, found.eps)
    return derived(node, graph, "scale", norm.group_scale.default, input, statistics, weight, bias)


def fuse_norms(graph_module: fx.GraphModule) -> None:
    """Put split norms together again, in place, where all parts are in the graph and its peak stays as it is."""
    graph, liveness = graph_module.graph, analyze(graph_module)
    found = {node: moments for node in graph.nodes if (moments := _moments_of(node)) is not None}
    if not found:
        return
    position = {node: index for index, node in enumerate(liveness.schedule)}
    live = liveness.live_bytes()
    peak = max(live)
    for node, moments in found.items():
        input, statistics, weight, bias = node.args
        with graph.inserting_before(node):
            whole, over = aten.group_norm.default, moments.args[1]
            if any(each is not None and each.meta["val"].dim() > 1 for each in (weight, bias)):
                whole, over = aten.layer_norm.default, list(node.meta["val"].shape[1:])
            fused = graph.call_function(whole, (input, over, weight, bias, statistics.args[2]))
        fused.meta = dict(node.meta)
        index = position[node]
        if live[index] - liveness.transient[index] + workspace_bytes(fused) > peak:
            graph.erase_node(fused)
        else:
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
    graph.eliminate_dead_code(stays)
    graph_module.recompile()


def _moments_of(node: fx.Node) -> fx.Node | None:
    """The moments of the input that a scale is made from, where they are taken in its graph."""
    if node.target is not norm.group_scale.default:
        return None
    statistics: Any = node.args[1]
    moments: Any = statistics.args[0] if statistics.target is norm.group_statistics.default else None
    return moments if moments is not None and moments.args and moments.args[0] is node.args[0] else None
