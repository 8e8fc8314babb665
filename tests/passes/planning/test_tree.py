"""The tree of a plan: its loops are those that run, it tells what they hold, and no later search changes it."""

from __future__ import annotations

import pytest
import torch

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.stream import MOST_OUTER, Search
from fxstream.tools.measure import measure_peak
from tests.passes.programs import Branch


@pytest.fixture
def case():
    torch.manual_seed(0)
    model, x = Branch().eval().requires_grad_(False), torch.randn(1, 16, 6, 32, 32)
    return normalize(capture(model, (x,)).graph_module), x


def nested(block):
    """All loops, those in bodies too, each with the graph that it runs in."""
    for loop in block.loops:
        yield loop, block.graph_module
        if loop.body is not None:
            yield from nested(loop.body)


def test_a_block_holds_what_it_says_whatever_is_searched_after(case):
    graph_module, x = case
    search = Search(graph_module, MOST_OUTER)
    share = 0.7 * search.before.peak_bytes
    blocks = [search.streamed(int(share), 0.0), search.streamed(None, 0.0), search.streamed(None, 1e9)]
    peaks = [block.after.peak_bytes for block in blocks]
    assert share >= peaks[0] > peaks[1] > peaks[2]
    for block in blocks:
        with torch.no_grad():
            measured = measure_peak(block.graph_module, x)
            assert measured.peak_bytes == pytest.approx(block.after.peak_bytes, rel=0.01)
            torch.testing.assert_close(measured.result[0], graph_module(x)[0])


def test_loops_are_the_nodes_that_run(case):
    graph_module, _ = case
    block = Search(graph_module, MOST_OUTER).streamed(None, 1e9)
    found = list(nested(block))
    assert any(loop.body is not None for loop, _ in found)
    for loop, around in found:
        assert around.get_submodule(loop.name) is loop.module
        assert sum(loop.module.lengths) == loop.group.run.extent
        if loop.body is not None:
            assert any(body is loop.body.graph_module for body in loop.module.graphs().values())
    assert block.added_flops > 0


def test_a_node_stands_for_an_interval_of_the_program(case):
    graph_module, _ = case
    block = Search(graph_module, MOST_OUTER).streamed(None, 0.0)
    intervals = list(block.intervals())
    assert max(live for *_, live in intervals) == block.after.peak_bytes
    assert {(loop.group.start, loop.group.end) for loop in block.loops} <= {(a, b) for a, b, _ in intervals}
