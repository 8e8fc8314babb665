"""Liveness against sums by hand on small graphs, and against the allocator on random networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import analyze, profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.candidates import whole
from fxstream.passes.planning.grouping import Group
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.rewriting.slicing import Slicer
from fxstream.tools.measure import measure_peak
from tests.passes.programs import BLOCKS, Network, example

KIB = 1024


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, KIB), requires_grad=False)  # 16 KiB
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def captured(function, *inputs):
    return normalize(capture(Call(function), inputs).graph_module)


def live(graph_module):
    """KiB live during each node."""
    return [size / KIB for size in profile(graph_module).live_bytes]


X = torch.randn(4, KIB)  # 16 KiB


def test_a_value_lives_from_its_birth_to_its_last_use():
    def function(self, x):
        a = x * 2
        b = a.exp()
        c = b + a  # the last use of a
        return c.sin()  # the last of c

    assert live(captured(function, X)) == [16, 32, 48, 32]


def test_a_view_keeps_its_base_alive_and_costs_nothing():
    def function(self, x):
        a = x * 2
        part = a[:1].t()  # slice, t
        b = x.exp()
        return b + part.sum()  # the sum is 4 bytes

    graph_module = captured(function, X)
    scalar = 4 / KIB
    assert live(graph_module) == [16, 16, 16, 32, 32 + scalar, 32 + scalar]
    of = analyze(graph_module).of
    mul, first, second, exp, *_ = of
    assert of[mul] == of[first] == of[second] != of[exp]


def test_results_live_to_the_end_whole_though_a_part_is_returned():
    def function(self, x):
        a = x * 2
        b = x.exp()
        return a[:1], b.sin().cos()

    assert live(captured(function, X)) == [16, 32, 32, 48, 48]


def test_several_results_in_one_storage_count_once():
    def function(self, x):
        first, second = (x * 2).chunk(2)
        return first, second

    graph_module = captured(function, X)
    assert set(live(graph_module)) == {16}
    assert len(analyze(graph_module).storages) == 1


def test_weights_and_inputs_are_apart_and_so_are_views_of_them():
    def function(self, x, y):
        return (x.t() + self.weight.t()).exp() * y

    found = profile(captured(function, X, torch.randn(1)))
    assert (found.weight_bytes, found.input_bytes) == (16 * KIB, 16 * KIB + 4)
    assert found.live_bytes == (0, 0, 16 * KIB, 32 * KIB, 32 * KIB)


def test_the_peak_tells_who_holds_it():
    def function(self, x):
        a = x * 2
        b = torch.cat([a, a])
        return b.exp().sum() + a.sum()

    found = profile(captured(function, X))
    assert found.peak_bytes == (16 + 32 + 32) * KIB
    assert found.nodes[found.peak_index] == "exp"
    assert [(held.node, held.shape, held.bytes) for held in found.holders] == [
        ("cat", (8, KIB), 32 * KIB),
        ("exp", (8, KIB), 32 * KIB),
        ("mul", (4, KIB), 16 * KIB),
    ]
    assert found.transient_bytes == 0


def test_the_inside_of_a_sliced_loop_counts():
    def function(self, x):
        wide = torch.cat([x, x, x, x], 1)  # a frame: 4 KiB
        return wide.exp().unflatten(1, (4, 256)).sum(1)  # 4, then 1

    graph_module = captured(function, torch.randn(12, 256))
    assert live(graph_module) == [48, 96, 48, 60]
    program = Program(graph_module)
    run = next(run for run in find_runs(program, [0]) if run.extent == 12)
    candidate = whole(program, run)
    found = profile(Slicer(program).rewrite([Group(candidate, (2,) * 6)]))
    assert found.transient_bytes == 2 * (4 + 4) * KIB
    assert found.peak_bytes == (12 + 16) * KIB


@settings(max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_the_peak_of_a_network_is_as_measured(names, seed):
    x = example(seed)
    graph_module = normalize(capture(Network(names, seed), (x,)).graph_module)
    with torch.no_grad():
        measured = measure_peak(graph_module, x)
    assert measured.peak_bytes == pytest.approx(profile(graph_module).peak_bytes, rel=0.01, abs=2 * KIB)
