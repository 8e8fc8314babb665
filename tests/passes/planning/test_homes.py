"""Homes: what is placed fits its limit as the rewritten graph's liveness has it, and every use finds its weight."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import analyze, profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.homes import place_weights
from fxstream.passes.rewriting.fetches import insert_fetches
from fxstream.passes.stream import stream
from tests.passes.programs import BLOCKS, Network, example

NAMES = st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4)


def graph_of(model, *inputs):
    return normalize(capture(model.eval(), inputs).graph_module)


def total(graph_module):
    found = profile(graph_module)
    return found.peak_bytes + found.weight_bytes


class Towers(nn.Module):
    """Linear layers of which the first is used again at the end."""

    def __init__(self, depth=6, width=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in (*self.layers, self.layers[0]):
            x = layer(x).relu()
        return x


@settings(max_examples=8)
@given(NAMES, st.floats(0, 1.2), st.booleans())
def test_any_limit_is_met_down_to_the_least(names, share, streamed):
    graph_module = graph_of(Network(names, 0), example(0))
    if streamed:
        graph_module = stream(graph_module, None).graph_module
    least, most = place_weights(graph_module, None), total(graph_module)
    limit = int(least.peak_bytes + share * (most - least.peak_bytes))
    homes = place_weights(graph_module, limit)
    fetching = insert_fetches(graph_module, homes.stays)
    assert total(fetching) == homes.peak_bytes <= max(limit, least.peak_bytes)
    assert profile(fetching).weight_bytes == homes.resident_bytes
    if share >= 1:
        assert not homes.stays


def test_the_least_is_what_one_node_needs():
    model, x = Towers(), torch.randn(4, 64)
    graph_module = graph_of(model, x)
    weight = 64 * 64 * 4
    assert place_weights(graph_module, None).peak_bytes == weight + 64 * 4 + 2 * 4 * 64 * 4
    with_bias = place_weights(graph_module, weight)  # less than there has to be
    assert with_bias.peak_bytes == weight + 64 * 4 + 2 * 4 * 64 * 4


def test_a_weight_that_is_used_again_is_the_first_to_stay():
    graph_module = graph_of(Towers(), torch.randn(4, 64))
    homes = place_weights(graph_module, 4 * 64 * 64 * 4)
    assert homes.stays
    assert not [stay for stay in homes.stays if "layers.0.weight" in stay.weight.name]


def test_fetches_begin_in_the_order_of_their_uses_and_ahead_of_them():
    graph_module = graph_of(Towers(), torch.randn(4, 64))
    homes = place_weights(graph_module, 4 * 64 * 64 * 4)
    begins, firsts = ([getattr(stay, name) for stay in homes.stays] for name in ("begin", "first"))
    assert begins == sorted(begins)
    assert firsts == sorted(firsts)
    assert all(begin < first for begin, first in zip(begins, firsts, strict=True) if first)


def test_what_there_is_room_for_is_not_read_twice():
    """The first weight is used at the start and at the end."""
    graph_module = graph_of(Towers(), torch.randn(4, 64))
    tight, ample = (place_weights(graph_module, limit) for limit in (None, 3 * 64 * 64 * 4))
    assert tight.moved_bytes > sum(parameter.nbytes for parameter in Towers().parameters())
    assert ample.moved_bytes < tight.moved_bytes


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(4096))
        self.linear = nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)
        self.halves = nn.Parameter(torch.randn(2, 64, 64))

    def forward(self, x):
        self.calls.add_(1)
        return self.tied(self.linear(x)) @ self.halves[0] + self.calls[:64], self.linear.bias


def test_what_is_written_or_returned_stays():
    graph_module = graph_of(Written(), torch.randn(4, 64))
    names = {stay.weight.name for stay in place_weights(graph_module, None).stays}
    assert {name.rpartition("model.")[2] for name in names} == {"linear.weight", "tied.weight", "tied.bias", "halves"}


class Widening(nn.Module):
    def __init__(self, depth=3, width=32):
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))

    def forward(self, x):
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(wide(x).relu())
        return x


def test_a_loop_around_others_fetches_in_its_body_where_the_limit_asks_for_it():
    model, x = Widening(), torch.randn(4, 256, 32)
    block = stream(graph_of(model, x), None)
    assert [len(loop.group.lengths) for loop in block.loops if loop.body and loop.body.loops] == [4]
    homes = place_weights(block.graph_module, None)
    fetching = insert_fetches(block.graph_module, homes.stays)
    assert {(stay.path, stay.times) for stay in homes.stays} == {(("loop_0",), 4)}
    assert total(fetching) == homes.peak_bytes < total(block.graph_module)
    assert torch.equal(fetching(x)[0], block.graph_module(x)[0])
    outside = place_weights(block.graph_module, total(block.graph_module) - 1)
    assert {stay.path for stay in outside.stays} <= {(), ("loop_0",)}


class Shared(Widening):
    """Weights that are read before a loop around others, and in it, one of them through a view."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 32))

    def forward(self, x):
        x = x * (1 + self.wide[0].weight.abs().mean() + self.table.square().mean())
        return super().forward(x + self.table.unsqueeze(0).tanh().mean(1, keepdim=True))


def test_what_is_fetched_outside_a_loop_is_at_home_to_its_body():
    model, x = Shared(), torch.randn(4, 256, 32)
    block = stream(graph_of(model, x), None)
    homes = place_weights(block.graph_module, None)
    paths = {name: {stay.path for stay in homes.stays if stay.weight.name == name} for name in ("model.wide.0.weight",)}
    assert paths["model.wide.0.weight"] == {(), ("loop_0",)}
    fetching = insert_fetches(block.graph_module, homes.stays)
    assert total(fetching) == homes.peak_bytes
    assert torch.equal(fetching(x)[0], block.graph_module(x)[0])


def test_uses_are_those_of_the_schedule():
    graph_module = graph_of(Towers(), torch.randn(4, 64))
    schedule = analyze(graph_module).schedule
    for stay in place_weights(graph_module, None).stays:
        for position in (stay.first, stay.last):
            assert any(str(read.target) == stay.weight.name for read in schedule[position].all_input_nodes)
