"""Operators without a rule: the models of the catalogue have none that reads a tensor, and others are listed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._ops import OpOverload

import fxstream
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.operators.axes import registered
from fxstream.passes.planning.barriers import barriers
from fxstream.passes.planning.program import Program
from fxstream.tools.catalogue import small

aten = torch.ops.aten

WITHOUT_A_RULE = {
    "svd-unet": {aten.arange.default, aten.arange.start},
    "modelscope-unet": {aten.arange.start},
}


@pytest.mark.parametrize("name", WITHOUT_A_RULE)
def test_operators_of_a_unet_have_rules(name):
    model, args, kwargs = small(name, frames=4, height=8, width=8)
    graph_module = normalize(capture(model, args, kwargs).graph_module)
    operators = {node.target for node in graph_module.graph.nodes if isinstance(node.target, OpOverload)}
    assert len(operators) > 10
    assert operators - registered() == WITHOUT_A_RULE[name]
    assert barriers(Program(graph_module)) == ()


class Unruled(nn.Module):
    """Two operators without a rule, one of them twice, the other of less memory."""

    def forward(self, x):
        small = x[0].topk(64, dim=0).values
        return (x * 2).cummax(1).values.sin().cummax(2).values * 2 + small


@pytest.fixture(scope="module")
def plan():
    assert {aten.cummax.default, aten.topk.default}.isdisjoint(registered())
    return fxstream.plan(Unruled(), (torch.randn(4, 64, 32),))


def test_barriers_are_counted_and_weighed(plan):
    size = 4 * 64 * 32 * 4
    cummax, topk = plan.barriers
    assert (cummax.operator, cummax.count) == ("aten.cummax.default", 2)
    assert (topk.operator, topk.count) == ("aten.topk.default", 1)
    assert cummax.bytes >= 2 * size > size > topk.bytes > 0


def test_barriers_are_printed(plan):
    printed = str(plan)
    assert "Operators without a rule" in printed
    assert plan.barriers_table() in printed
    lines = plan.barriers_table().splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [["aten.cummax.default", "2"], ["aten.topk.default", "1"]]


def test_no_loop_runs_through_a_barrier(plan):
    unruled = [i for i, name in enumerate(plan.before.nodes) if name.startswith(("cummax", "topk"))]
    assert len(unruled) == 3
    for group in plan.groups:
        first, last = (plan.before.nodes.index(name) for name in (group.first, group.last))
        assert not any(first <= index <= last for index in unruled)


def test_without_barriers_no_table():
    printed = str(fxstream.plan(nn.Linear(4, 4), (torch.randn(3, 4),)))
    assert "without a rule" not in printed
