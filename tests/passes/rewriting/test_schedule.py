"""Schedules: less live at once, the same values, and no order changed for nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.schedule import schedule
from fxstream.tools.measure import measure_peak
from tests.passes.programs import BLOCKS, Network, example


class Branches(nn.Module):
    """Three large branches of a small value, each made first and reduced last."""

    def forward(self, x):
        large = [(x * scale).expand(64, *x.shape).exp() for scale in (1, 2, 3)]
        small = [each.sum(0) for each in large]
        return small[0] + small[1] + small[2]


class Late(nn.Module):
    """A large value made long before it is read."""

    def forward(self, x, y):
        large = x.expand(32, *x.shape).exp()
        hidden = y.expand(32, *y.shape).sin().sum(0)
        return large.sum(0) * hidden


class Activated(nn.Module):
    """The same, with an activation of it that takes its place."""

    def forward(self, x, y):
        large = x.expand(32, *x.shape).exp().sigmoid()
        hidden = y.expand(32, *y.shape).sin().cos().sum(0)
        return large.sum(0) * hidden


def captured(model, *args):
    return normalize(capture(model, args).graph_module)


MODELS = [(Branches(), 1), (Late(), 2), (Activated(), 2)]


@pytest.mark.parametrize("model, count", MODELS, ids=["branches", "late", "activated"])
def test_less_is_live_at_once(model, count):
    inputs = [torch.randn(16, 32) for _ in range(count)]
    before = captured(model, *inputs)
    after = schedule(before)
    assert profile(after).peak_bytes < 0.7 * profile(before).peak_bytes
    with torch.no_grad():
        measured = measure_peak(after, *inputs)
        assert torch.equal(measured.result[0], model(*inputs))
    assert measured.peak_bytes == profile(after).peak_bytes


def test_an_order_that_is_good_is_kept():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    graph_module = captured(model, torch.randn(4, 8))
    assert schedule(graph_module) is graph_module


def test_a_graph_that_writes_is_left_alone():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            large = x.expand(32, *x.shape).exp()
            self.calls.add_(1)
            return x.sum() + large.sum()

    graph_module = captured(Counts(), torch.randn(8, 8))
    assert schedule(graph_module) is graph_module


@settings(max_examples=10)
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3), seed=st.integers(0, 100))
def test_networks_compute_the_same(names, seed):
    model, x = Network(names, seed), example(seed)
    graph_module = captured(model, x)
    after = schedule(graph_module)
    assert profile(after).peak_bytes <= profile(graph_module).peak_bytes
    with torch.no_grad():
        for value, reference in zip(after(x), graph_module(x), strict=True):
            assert torch.equal(value, reference)
