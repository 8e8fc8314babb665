"""Composites: what is written through an operator that may return a view is written to what it views."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxstream.passes.graph.capture import capture

X = torch.randn(2, 3, 4, 4)

VIEWS = {
    "dropout": lambda h: F.dropout(h, 0.1, False),
    "dropout of channels": lambda h: F.dropout2d(h, 0.1, False),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.1, False),
    "dropout of nothing": lambda h: F.dropout(h, 0.0, True),
    "type_as": lambda h: h.type_as(h),
    "einsum": lambda h: torch.einsum("abij->abji", h),
    "contiguous": lambda h: h.contiguous(),
    "to": lambda h: h.to(torch.float32),
    "reshape": lambda h: h.reshape(6, 16),
    "atleast": torch.atleast_2d,
    "broadcast": lambda h: torch.broadcast_to(h, h.shape),
}


class Writes(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, x):
        h = x * 2
        self.view(h).add_(1).mul_(3)
        return h


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_a_view_is_kept(name):
    model = Writes(VIEWS[name]).eval()
    assert torch.equal(capture(model, (X,)).graph_module(X)[0], model(X))


def test_a_write_through_a_view_of_an_input_is_kept():
    def forward(x):
        F.dropout(x, 0.1, False).add_(1)
        return x * 2

    class Call(nn.Module):
        def forward(self, x):
            return forward(x)

    captured = capture(Call(), (X.clone(),))
    mine, its = X.clone(), X.clone()
    assert torch.equal(captured.graph_module(mine)[0], forward(its)) and torch.equal(mine, its)


def test_composites_through_which_nothing_is_written_stay_whole():
    class Call(nn.Module):
        def forward(self, x):
            return torch.einsum("abij->abji", x * 2) + F.linear(x, x[0, 0])

    targets = {node.target for node in capture(Call(), (X,)).graph_module.graph.nodes}
    assert {torch.ops.aten.einsum.default, torch.ops.aten.linear.default} <= targets
