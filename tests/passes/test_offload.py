"""Offload: activations and weights within one budget, with loops where they are needed."""

import pytest
import torch

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.offload import offload
from tests.passes.programs import Network, example


@pytest.fixture(scope="module")
def graph_module():
    model = Network(("spatial", "temporal", "pixels", "feedforward", "skip"), 0).eval()
    return normalize(capture(model, (example(0),)).graph_module)


@pytest.fixture(scope="module")
def lowest(graph_module):
    return offload(graph_module, None)


def total(graph_module):
    found = profile(graph_module)
    return found.peak_bytes + found.weight_bytes


def test_the_lowest_is_what_the_graph_holds(lowest, graph_module):
    block, homes = lowest
    assert total(block.graph_module) == homes.peak_bytes < total(graph_module)
    assert block.after == profile(block.graph_module)
    for loop in block.loops:
        assert block.graph_module.get_submodule(loop.name) is loop.module


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_limits_are_met(lowest, graph_module, share):
    least = lowest[1].peak_bytes
    limit = int(least + share * (total(graph_module) - least))
    block, homes = offload(graph_module, limit)
    assert total(block.graph_module) == homes.peak_bytes <= limit
    assert homes.moved_bytes <= lowest[1].moved_bytes


def test_a_limit_that_cant_be_met_ends_at_the_lowest(lowest, graph_module):
    _, homes = offload(graph_module, lowest[1].peak_bytes // 2)
    assert 0 <= lowest[1].peak_bytes - homes.peak_bytes <= 0.01 * homes.peak_bytes


def test_nothing_is_fetched_where_all_weights_fit(graph_module):
    block, homes = offload(graph_module, total(graph_module))
    assert not homes.stays
    assert block.graph_module is graph_module
    half = profile(graph_module).weight_bytes + profile(graph_module).peak_bytes // 2
    block, homes = offload(graph_module, half)
    assert not homes.stays
    assert total(block.graph_module) <= half


def test_it_runs(lowest, graph_module):
    block, _ = lowest
    with torch.no_grad():
        for found, expected in zip(block.graph_module(example(0)), graph_module(example(0)), strict=True):
            torch.testing.assert_close(found, expected)
