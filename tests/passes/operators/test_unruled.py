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
        small = x[0].masked_scatter(x[0] > 0, x[0])
        return (x * 2 + small).renorm(2, 1, 1.0).sin().renorm(2, 2, 1.0) * 2


@pytest.fixture(scope="module")
def plan():
    assert {aten.renorm.default, aten.masked_scatter.default}.isdisjoint(registered())
    return fxstream.plan(Unruled(), (torch.randn(4, 64, 32),))


def test_barriers_are_counted_and_weighed(plan):
    size = 4 * 64 * 32 * 4
    renorm, masked_scatter = plan.barriers
    assert (renorm.operator, renorm.count) == ("aten.renorm.default", 2)
    assert (masked_scatter.operator, masked_scatter.count) == ("aten.masked_scatter.default", 1)
    assert renorm.bytes >= 2 * size > size > masked_scatter.bytes > 0


def test_barriers_are_printed(plan):
    printed = str(plan)
    assert "Operators without a rule" in printed
    assert plan.barriers_table() in printed
    lines = plan.barriers_table().splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [["aten.renorm.default", "2"], ["aten.masked_scatter.default", "1"]]


def test_no_loop_runs_through_a_barrier(plan):
    unruled = [i for i, name in enumerate(plan.before.nodes) if name.startswith(("renorm", "masked_scatter"))]
    assert len(unruled) == 3
    for group in plan.groups:
        first, last = (plan.before.nodes.index(name) for name in (group.first, group.last))
        assert not any(first <= index <= last for index in unruled)


def test_without_barriers_no_table():
    printed = str(fxstream.plan(nn.Linear(4, 4), (torch.randn(3, 4),)))
    assert "without a rule" not in printed
