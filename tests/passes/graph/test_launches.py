"""Launches: what a graph runs, held against what the profiler counts of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxstream
from fxstream.fake import fake_on
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.launches import launches
from fxstream.passes.graph.normalize import normalize


class Calls(TorchDispatchMode):
    """Counts the operators that make something of their own, or write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = all(each.alias_info is not None and not each.alias_info.is_write for each in function._schema.returns)
        allocates = function in (torch.ops.aten.empty_strided.default, torch.ops.aten.empty.memory_format)
        self.count += not views and not allocates
        return function(*args, **(kwargs or {}))


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 32)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x))).view(-1, 32)


@pytest.mark.parametrize("budget", ["1GiB", 0.3])
def test_they_are_the_operators_that_run(budget):
    model, x = Feed().eval(), torch.randn(64, 16, 32)
    streamed = fxstream.optimize(model, budget, (x,))
    with torch.no_grad(), Calls() as calls:
        streamed(x)
    [plan] = streamed.plans
    before, after = plan.launches
    assert before == 3
    assert (after > before) == bool(plan.groups) == (budget == 0.3)
    assert calls.count == after


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_norm_is_a_few_kernels_on_a_card_split_or_not():
    with fake_on("cuda", torch.float16):
        model, x = nn.GroupNorm(4, 16).eval(), torch.randn(1, 16, 256, 256)
    graph_module = normalize(capture(model, (x,)).graph_module)
    assert launches(graph_module) == 3
    plan = fxstream.plan(nn.Sequential(model, nn.SiLU()), (x,), memory_budget=0.99)
    assert plan.launches[0] == 4
