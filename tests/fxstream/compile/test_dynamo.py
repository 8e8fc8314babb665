"""Graphs as Dynamo gives them, planned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher

from fxstream.budget import Budget
from fxstream.compile.dynamo import plan_graph
from tests.dynamo import fresh_dynamo  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class TokensToImage(nn.Module):
    """A view gives the batch of one a stride that tells the convolution after it how to lay out its result."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(32, 32), nn.Conv2d(32, 32, 1)

    def forward(self, tokens):
        return self.conv(self.linear(tokens).transpose(1, 2).view(1, 32, 16, 24)) * 2


def test_layouts_are_those_of_a_real_run_whatever_traces():
    """AOTAutograd traces with Python's own views, whose strides differ where a size is one."""
    model, tokens = TokensToImage().eval().requires_grad_(False), torch.randn(1, 384, 32)
    found = []

    def backend(graph_module, inputs):
        with enable_python_dispatcher():
            planned = plan_graph(graph_module, inputs, Budget.parse("min"))
        found.append(planned.captured.graph_module.graph.output_node().args[0][0].meta["val"].stride())
        return graph_module.forward

    result = torch.compile(model, backend=backend, fullgraph=True)(tokens)
    assert found == [result.stride()]
