"""Spills: the same values to the last bit with activations in files, and memory as planned."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.spills import spill_values
from fxstream.passes.stream import Search, Spilling, stream
from fxstream.runtime import loop
from fxstream.runtime.release import give_back
from fxstream.runtime.spill import send_home
from fxstream.tools.measure import measure_peak
from tests.passes.programs import BLOCKS, Network, example

NAMES = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3)


@pytest.fixture
def small_pages(monkeypatch):
    """As if pages were so small that a window of a small tensor is less than all of it."""
    monkeypatch.setattr(loop, "mmap", SimpleNamespace(PAGESIZE=64))


class Deep(nn.Module):
    """Convolutions at a size, one skip around all of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rise, self.out = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 1)
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))
        self.norm = nn.GroupNorm(4, 32)

    def forward(self, x):
        skip = x = self.rise(x)
        for conv in self.convs:
            x = conv(F.silu(self.norm(x)))
        return self.out(x + skip)


X = torch.randn(2, 3, 64, 256, generator=torch.Generator().manual_seed(0))
ONE = 2 * 32 * 64 * 256 * 4
"""Bytes of an activation of that model."""


@pytest.fixture(scope="module")
def graph_module():
    return normalize(capture(Deep().eval(), (X,)).graph_module)


def same(graph_module, changed, *inputs):
    with torch.no_grad():
        expected, found = graph_module(*inputs), changed(*inputs)
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(expected, found, strict=True))


def test_loops_around_files(graph_module):
    """No activation is in memory, where with slices alone two are."""
    search = Search(graph_module, 0, Spilling(ONE / 2, ""))
    block = search.streamed(None, 0.0)
    assert stream(graph_module, None, most_outer=0).after.peak_bytes >= 2 * ONE
    assert block.after.peak_bytes < ONE / 2
    assert sum(spill.bytes for spill in block.spills) >= 4 * ONE
    assert all(spill.moved >= 2 * spill.bytes for spill in block.spills)
    with torch.no_grad():
        measured, expected = measure_peak(lambda: block.graph_module(X)), graph_module(X)
    assert measured.peak_bytes <= block.after.peak_bytes
    assert (measured.result[0] - expected[0]).norm() <= 1e-6 * expected[0].norm()


def test_a_budget_spills_no_more_than_it_has_to(graph_module):
    search = Search(graph_module, 0, Spilling(ONE / 2, ""))
    lowest, half = search.streamed(None, 0.0), search.streamed(2 * ONE, 0.0)
    assert half.after.peak_bytes <= 2 * ONE
    assert sum(spill.moved for spill in half.spills) < sum(spill.moved for spill in lowest.spills)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, st.floats(0, 0.9))
def test_networks_compute_the_same_within_what_was_planned(small_pages, names, share):
    model, x = Network(names, 0).eval(), example(0)
    graph_module = normalize(capture(model, (x,)).graph_module)
    block = stream(graph_module, None)
    changed, spills = spill_values(block.graph_module, share * block.after.peak_bytes, "")
    assert same(block.graph_module, changed, x)
    planned = profile(changed)
    assert planned.peak_bytes <= block.after.peak_bytes
    assert bool(spills) == (changed is not block.graph_module)
    with torch.no_grad():
        assert measure_peak(lambda: changed(x)).peak_bytes <= planned.peak_bytes


def test_what_no_loop_makes_or_reads_is_sent_and_read_as_a_whole(graph_module):
    changed, spills = spill_values(graph_module, 0, "")
    assert spills
    targets = [node.target for node in changed.graph.nodes]
    assert targets.count(send_home) == len(spills)
    assert give_back in targets
    assert same(graph_module, changed, X)
    assert profile(changed).peak_bytes <= profile(graph_module).peak_bytes


def test_where_the_limit_is_met_nothing_goes(graph_module):
    assert spill_values(graph_module, profile(graph_module).peak_bytes, "") == (graph_module, ())


class Kept(nn.Module):
    """Values that can't go: what is returned, what is written in place, one of several results."""

    def forward(self, x):
        returned = x.exp()
        written = x.sin()
        written[:, 0] = 1.0
        values, _ = returned.max(1, keepdim=True)
        return returned, (written + values + returned).sum()


def test_what_stays():
    x = torch.randn(4, 64, 1024)
    graph_module = normalize(capture(Kept(), (x,)).graph_module)
    changed, spills = spill_values(graph_module, 0, "")
    assert same(graph_module, changed, x)
    returned = {node.name for node in graph_module.graph.output_node().all_input_nodes}
    assert returned.isdisjoint(spill.name for spill in spills)
