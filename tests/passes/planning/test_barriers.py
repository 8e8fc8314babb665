"""Barriers: operators without a rule are listed, and no longer once they have one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.operators import axes
from fxstream.passes.operators.axes import Cut, rule
from fxstream.passes.planning.barriers import Barrier, barriers
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.stream import stream

KIB = 1024


@torch.library.custom_op("fxstream_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


DOUBLE = torch.ops.fxstream_tests.double.default


class Block(nn.Module):
    def forward(self, x):
        wide = torch.cat([x, x, x, x], 1).exp()
        return double(wide).cos().unflatten(1, (4, -1)).sum(1)


class Renorms(nn.Module):
    def forward(self, x):
        return (x.renorm(2, 0, 1.0) + torch.cat([x, x]).renorm(2, 0, 1.0)[:8]).sin()


@pytest.fixture
def rules(monkeypatch):
    """The rules that a test registers go with it."""
    monkeypatch.setattr(axes, "_RULES", dict(axes._RULES))


def captured(module, *inputs):
    return normalize(capture(module, inputs).graph_module)


X = torch.randn(8, 256)  # 8 KiB


def test_a_program_of_known_operators_has_none():
    assert barriers(Program(captured(nn.Sequential(nn.Linear(256, 8), nn.SiLU()), X))) == ()


def test_an_operator_without_a_rule_is_listed_with_its_bytes():
    program = Program(captured(Block(), X))
    # Its input and its output, each four times x.
    assert barriers(program) == (Barrier("fxstream_tests.double.default", 1, 64 * KIB),)


def test_nodes_of_one_operator_are_one_barrier_with_the_most_of_their_bytes():
    program = Program(captured(Renorms(), X))
    # The second: the first's result (8) and, after it, cat (16) and its own (16); x is the caller's.
    [found] = barriers(program)
    assert (found.operator, found.count) == ("aten.renorm.default", 2)
    assert 40 * KIB <= found.bytes <= (40 + 16) * KIB


def test_the_worst_barrier_is_first():
    class Both(nn.Module):
        def forward(self, x):
            return double(torch.cat([x, x]).renorm(2, 0, 1.0)[:8])

    found = barriers(Program(captured(Both(), X)))
    assert [barrier.operator for barrier in found] == ["aten.renorm.default", "fxstream_tests.double.default"]
    assert found[0].bytes > found[1].bytes


def test_a_rule_lets_the_axis_through(rules):
    def reach():
        program = Program(captured(Block(), X))
        return max(run.end for run in find_runs(program, [0])), len(program) - 1

    end, last = reach()
    assert end < last
    before = stream(captured(Block(), X), None)

    @rule(DOUBLE)
    def elementwise(call, out):
        return Cut((out,))

    assert reach() == (last, last)
    assert barriers(Program(captured(Block(), X))) == ()
    streamed = stream(captured(Block(), X), None)
    assert streamed.after.peak_bytes < before.after.peak_bytes / 3
    assert torch.equal(streamed.graph_module(X)[0], Block()(X))


def test_a_rule_goes_with_its_test():
    assert DOUBLE not in axes.registered()
