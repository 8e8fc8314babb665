"""Pieces: where they begin and end."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import analyze
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.pieces import find_pieces


def pieces(function, *args):
    class Model(nn.Module):
        def forward(self, *args):
            return function(*args)

    liveness = analyze(normalize(capture(Model(), args).graph_module))
    names = [str(node.target).removeprefix("aten.").split(".")[0] for node in liveness.schedule]
    return [names[piece.start : piece.stop] for piece in find_pieces(liveness)]


def test_between_kernels():
    x, weight, large = torch.randn(4, 8), torch.randn(8, 8), torch.randn(1000)

    def function(x, weight, large):
        x = F.linear((x + 1).relu(), weight)
        x = F.linear((x * 2).sigmoid() + x, weight)
        return x.relu() + (large * 2).sum()  # the peak, below which there is room for the rest

    assert pieces(function, x, weight, large) == [["add", "relu"], ["mul", "sigmoid", "add"], ["mul", "sum"]]


def test_one_operator_is_no_piece():
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    assert pieces(lambda x, weight: F.linear(F.linear(x, weight).relu().t(), weight[:4, :4]), x, weight) == []


def test_they_stay_within_the_peak():
    """All that is made in a piece may be live at once, so a chain that frees as it goes is cut."""
    x = torch.randn(1000)

    def function(x):
        for _ in range(3):
            x = x.sin().cos()
        return x

    assert pieces(function, x) == [["sin", "cos"]]


def test_a_call_and_what_picks_its_results_stay_together():
    x, weight, held = torch.randn(4, 8), torch.randn(8, 4), torch.randn(1000)

    def function(x, weight, held):
        held = (held * 2).sum()
        top = torch.topk(x.sin().cos(), 4)
        return F.linear(top.values, weight) + top.indices.sum() + held

    for piece in pieces(function, x, weight, held):
        assert ("topk" in piece) == ("<built-in function getitem>" in piece)


def test_random_operators_and_writes_are_left_alone():
    x, held = torch.randn(4, 8), torch.randn(1000)

    def function(x, held):
        held = (held * 2).sum()
        y = (x + 1).cos()
        return F.dropout(y, 0.5, training=True).sin().cos() + held

    found = pieces(function, x, held)
    assert found and all("bernoulli" not in name and "dropout" not in name for piece in found for name in piece)
