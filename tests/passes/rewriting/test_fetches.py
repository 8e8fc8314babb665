"""Fetches: the same values to the last bit, and memory as planned."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.machine.allocations import ALIGNMENT
from fxstream.passes.planning.homes import place_weights
from fxstream.passes.rewriting.fetches import insert_fetches
from fxstream.passes.stream import stream
from fxstream.tools.measure import measure_peak
from tests.passes.programs import BLOCKS, Network, example

NAMES = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3)


class Views(nn.Module):
    """Weights that are read through views, in pieces, converted and twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.all = nn.Parameter(torch.randn(3, 16, 16))
        self.fused = nn.Linear(16, 48)
        self.reduced = nn.Parameter(torch.randn(16, 16).half())
        self.kernel = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x):
        q, k, v = (x @ each for each in self.all.unbind())
        weight, bias = self.fused.weight.chunk(3), self.fused.bias.chunk(3)
        x = F.linear(q, weight[0], bias[0]) + F.linear(k, weight[2], bias[2]).tanh() @ self.reduced.float().t()
        x = x + F.linear(v, weight[1].t(), bias[1]) + self.all[1, 3]
        return self.kernel(x.t().reshape(1, 16, 2, 2)).flatten()


def fetching(graph_module, limit):
    return insert_fetches(graph_module, place_weights(graph_module, limit).stays)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_views_are_taken_of_what_was_fetched(share):
    model, x = Views().eval(), torch.randn(4, 16)
    graph_module = normalize(capture(model, (x,)).graph_module)
    found = profile(graph_module)
    limit = int(share * (found.peak_bytes + found.weight_bytes)) or None
    changed = fetching(graph_module, limit)
    assert any(node.op == "call_function" and "fetch" in str(node.target) for node in changed.graph.nodes)
    with torch.no_grad():
        assert torch.equal(changed(x)[0], graph_module(x)[0])
        torch.testing.assert_close(changed(x)[0], model(x))
        assert measure_peak(lambda: changed(x)).peak_bytes == profile(changed).peak_bytes


@settings(max_examples=5)
@given(NAMES, st.floats(0, 0.9), st.sampled_from([None, 0.5]))
def test_networks_compute_the_same_within_what_was_planned(names, share, budget):
    model, x = Network(names, 0).eval(), example(0)
    graph_module = normalize(capture(model, (x,)).graph_module)
    peak = profile(graph_module).peak_bytes
    block = stream(graph_module, None if budget is None else int(budget * peak))
    least = place_weights(block.graph_module, None).peak_bytes
    most = block.after.peak_bytes + block.after.weight_bytes
    changed = fetching(block.graph_module, int(least + share * (most - least)))
    with torch.no_grad():
        expected, found = block.graph_module(x), changed(x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert abs(measure_peak(lambda: changed(x)).peak_bytes - profile(changed).peak_bytes) < ALIGNMENT


def test_an_error_while_a_weight_is_on_its_way_leaves_the_next_call_right():
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x, index):
            for layer in self.layers:
                x = layer(x).index_select(0, index)
            return x

    model, x = Refuses().eval(), torch.randn(4, 64)
    graph_module = normalize(capture(model, (x, torch.arange(4))).graph_module)
    changed = fetching(graph_module, 3 * 64 * 64 * 4)
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises((IndexError, RuntimeError), match="index"):
                changed(x, torch.full((4,), 9))
            assert torch.equal(changed(x, torch.arange(4))[0], graph_module(x, torch.arange(4))[0])
