"""Lowering: what is compiled of a graph, how often, and that it runs as planned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.lower import Lowering, identity
from fxstream.passes.stream import stream
from fxstream.runtime.loop import SlicedLoop
from fxstream.tools.measure import measure_peak
from tests.passes.programs import Network, TokenFeedForward, example


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def streamed(model: nn.Module, *args: torch.Tensor, budget: int | None = None):
    return stream(normalize(capture(model, args).graph_module), budget).graph_module


class Recorded:
    """Compiles nothing, and keeps what it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph_module):
        self.graphs.append(graph_module)
        return graph_module.forward


@pytest.mark.parametrize("share", [0.6, None])
def test_a_lowered_graph_runs_as_the_graph(share):
    model, x = Network(("spatial", "temporal", "frames", "feedforward", "skip"), 0).eval(), example(0)
    captured = normalize(capture(model, (x,)).graph_module)
    budget = None if share is None else int(share * profile(captured).peak_bytes)
    graph_module = stream(captured, budget).graph_module
    compiled = Recorded()
    lowered = Lowering("mine", compiled).lower(graph_module)
    assert compiled.graphs
    for value, expected in zip(lowered(x), graph_module(x), strict=True):
        assert torch.equal(value, expected)
    assert measure_peak(lowered, x).peak_bytes <= profile(graph_module).peak_bytes
    assert next(lowered.parameters()) is next(model.parameters())


def test_loops_with_loops_inside_them():
    model, x = (
        Network(("spatial", "temporal", "pixels", "feedforward", "spatial", "temporal", "skip"), 0).eval(),
        example(0),
    )
    graph_module = streamed(model, x)
    outer = [loop for loop in graph_module.children() if isinstance(loop, SlicedLoop)]
    assert any(
        isinstance(inner, SlicedLoop) for loop in outer for body in loop.bodies.values() for inner in body.modules()
    )
    lowered = Lowering("mine", Recorded()).lower(graph_module)
    assert torch.equal(lowered(x)[0], graph_module(x)[0])
    assert [loop.lengths for loop in outer] == [m.lengths for m in lowered.children() if isinstance(m, SlicedLoop)]


def test_blocks_of_one_structure_are_compiled_once():
    class Blocks(nn.Module):
        """Three blocks, with a value between them that no axis gets through."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(TokenFeedForward(8) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
                x = (x - x.mean()).roll((1, 1, 1), (0, 1, 2))
            return x

    model, x = Blocks(), torch.randn(7, 6, 8)
    graph_module = streamed(model, x)
    loops = [loop for loop in graph_module.modules() if isinstance(loop, SlicedLoop)]
    bodies = [body for loop in loops for body in loop.bodies.values() if not body.graph.find_nodes(op="call_module")]
    compiled = Recorded()
    lowered = Lowering("mine", compiled).lower(graph_module)
    distinct = [identity(graph) for graph in compiled.graphs]
    assert len(distinct) == len(set(distinct))
    assert {identity(body) for body in bodies} <= set(distinct)
    assert len({identity(body) for body in bodies}) < len(bodies)
    assert torch.equal(lowered(x)[0], graph_module(x)[0])


def test_identity_is_of_what_is_computed_alone():
    def of(model: nn.Module, *args: torch.Tensor) -> str:
        return identity(normalize(capture(model, args).graph_module))

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, first, second):
            return first * self.factor + second

    x, y = torch.randn(2, 4, 6)
    assert of(Scaled(2.0), x, y) == of(Scaled(2.0), torch.zeros(4, 6), y)
    others = [of(Scaled(3.0), x, y), of(Scaled(2.0), x, torch.randn(6)), of(Scaled(2.0), x, torch.randn(6, 4).t())]
    assert len({of(Scaled(2.0), x, y), *others}) == 4
    renamed = normalize(capture(Scaled(2.0), (x, y)).graph_module)
    for node in renamed.graph.nodes:
        node.name = f"other_{node.name}"
    assert identity(renamed) == of(Scaled(2.0), x, y)


def test_what_a_compiled_part_returns_is_laid_out_as_planned():
    """For that the parts after it were compiled."""

    def otherwise(graph_module):
        def run(*tensors):
            results = graph_module(*tensors)
            return [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in results]

        return run

    model, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Sigmoid()).requires_grad_(False), torch.randn(2, 4, 9, 9)
    lowered = Lowering("otherwise", otherwise).lower(streamed(model, x))
    [result], expected = lowered(x), model(x)
    assert result.stride() == expected.stride()
    torch.testing.assert_close(result, expected)
