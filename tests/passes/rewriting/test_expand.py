"""Expand: a node in parts is the node to all that reads it, its views among them."""

from __future__ import annotations

import torch
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import analyze
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.expand import derived, expand

aten = torch.ops.aten


class Scaled(nn.Module):
    """Reads a mean through a view, after an operator that has nothing to do with it."""

    def forward(self, x):
        scale = (x * 2).mean(2)[:, :, None]
        return x.exp() * scale


def test_views_of_what_was_expanded_lie_in_it():
    x = torch.randn(2, 3, 8)
    graph_module = normalize(capture(Scaled(), (x,)).graph_module)
    [mean] = [node for node in graph_module.graph.nodes if node.target is aten.mean.dim]

    def sum_and_divide(graph, env):
        total = derived(mean, graph, "sum", aten.sum.dim_IntList, env[mean.args[0]], [2])
        return derived(mean, graph, "share", aten.div.Tensor, total, x.shape[2])

    expanded = expand(graph_module, {mean: sum_and_divide})
    assert torch.allclose(expanded(x)[0], Scaled()(x))
    liveness = analyze(expanded)
    named = {node.name: node for node in liveness.schedule}
    share, view = (
        named[f"{mean.name}_share"],
        next(node for name, node in named.items() if name.startswith("unsqueeze")),
    )
    assert liveness.of[share] == liveness.of[view]
    [storage] = liveness.of[share]
    assert liveness.storages[storage].death == liveness.schedule.index(next(iter(view.users)))
    assert share.meta["origin"] == mean.name and share.meta["part"] == "share"


def test_without_parts_the_graph_is_the_same():
    graph_module = normalize(capture(Scaled(), (torch.randn(2, 3, 8),)).graph_module)
    assert expand(graph_module, {}) is graph_module
