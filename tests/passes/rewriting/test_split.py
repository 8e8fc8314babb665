"""Split: the full graph returns the cut's values, the skip graph computes the same from them."""

from __future__ import annotations

import pytest
import torch

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.cut import find_cut
from fxstream.passes.rewriting.split import split, subgraph
from fxstream.tools.bench import relative_l2
from fxstream.tools.catalogue import small
from tests.denoiser import Denoiser, latent


@pytest.fixture(scope="module")
def graph_module():
    return normalize(capture(Denoiser().eval(), (latent(), torch.tensor(500.0))).graph_module)


@pytest.fixture
def tensors():
    return latent(), torch.tensor(500.0)


def node(graph_module, name):
    return next(node for node in graph_module.graph.nodes if node.name == name)


def places(graph_module):
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"][:2]


@pytest.mark.parametrize("where", ["auto", "paper", "deepcache", "mid_block", "down_blocks.1", "up_blocks.0.conv"])
def test_both_graphs_compute_what_the_model_does(graph_module, tensors, where):
    made = split(graph_module, find_cut(graph_module, where, *places(graph_module)))
    (expected,) = graph_module(*tensors)
    result, *values = made.full(*tensors)
    assert torch.equal(result, expected)
    assert torch.equal(made.skip(*tensors, *values)[0], expected)
    assert made.bytes == sum(value.nbytes for value in values)
    assert len(made.skip.graph.nodes) < len(graph_module.graph.nodes)


def test_a_unet_of_diffusers():
    model, args, kwargs = small("svd-unet", frames=2, height=16, width=16, batch=1)
    captured = capture(model, args, kwargs)
    graph_module = normalize(captured.graph_module)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    with torch.no_grad():
        (expected,) = graph_module(*tensors)
        for where in ("auto", "paper", "deepcache"):
            made = split(graph_module, find_cut(graph_module, where, *places(graph_module)))
            result, *values = made.full(*tensors)
            assert relative_l2(result, expected) <= 1e-6
            assert relative_l2(made.skip(*tensors, *values)[0], expected) <= 1e-6


def test_the_skip_graph_reads_the_values(graph_module, tensors):
    """Other values, another result: nothing of theirs is computed anew."""
    made = split(graph_module, find_cut(graph_module, "paper", *places(graph_module)))
    result, value = made.full(*tensors)
    assert not torch.allclose(made.skip(*tensors, value + 1)[0], result)


def test_a_value_that_shares_its_storage_is_returned_apart(graph_module, tensors):
    """What is held must not change with what the caller does to the result."""
    last = graph_module.graph.output_node().args[0][0]
    made = split(graph_module, [last.args[0]])
    result, value = made.full(*tensors)
    assert result.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    assert value.untyped_storage().nbytes() == value.nbytes == made.bytes


def test_the_graph_is_left_as_it_is(graph_module, tensors):
    before = str(graph_module.graph)
    split(graph_module, find_cut(graph_module, "paper", *places(graph_module)))
    assert str(graph_module.graph) == before


def test_weights_are_shared(tensors):
    model = Denoiser().eval()
    graph_module = normalize(capture(model, tensors).graph_module)
    made = split(graph_module, find_cut(graph_module, "paper", *places(graph_module)))
    before, value = made.full(*tensors)
    with torch.no_grad():
        model.last.weight.zero_()
        model.last.bias.fill_(2.0)
    assert torch.equal(made.skip(*tensors, value)[0], torch.full_like(before, 2.0))


def test_subgraph_computes_values_alone(graph_module, tensors):
    (value,) = find_cut(graph_module, "down_blocks.0", *places(graph_module))
    made = subgraph(graph_module, [value])
    full = split(graph_module, [value]).full
    assert torch.equal(made(*tensors)[0], full(*tensors)[1])
    assert len(made.graph.nodes) < len(graph_module.graph.nodes) / 2


class TestErrors:
    def test_a_value_that_the_output_does_not_depend_on(self, graph_module):
        first, second = (find_cut(graph_module, path, *places(graph_module)) for path in ("up_blocks.0", "up_blocks.2"))
        with pytest.raises(ValueError, match=r"the output does not depend on the cut at .* of up_blocks.0"):
            split(graph_module, [*first, *second])

    def test_an_input(self, graph_module):
        with pytest.raises(ValueError, match="no value that the graph computes"):
            split(graph_module, places(graph_module)[:1])

    def test_nothing_to_skip(self):
        class Sum(torch.nn.Module):
            def forward(self, x):
                return x.relu() + 1

        graph_module = normalize(capture(Sum(), (torch.randn(3),)).graph_module)
        relu = node(graph_module, "relu")
        made = split(graph_module, [relu])
        assert [n.name for n in made.skip.graph.nodes if n.op == "call_function"] == ["add"]


class Noisy(torch.nn.Module):
    """Draws before and after what a skipped step takes, and returns that, a view of it, and an input."""

    def forward(self, sample, timestep):
        first = torch.rand_like(sample)
        deep = (sample * 2 + first * timestep).sin().cos()
        return deep, deep[0], sample, torch.rand_like(sample) + timestep


def test_draws_take_place_in_both_graphs_and_what_is_returned_is_the_callers():
    x, t = torch.ones(2, 3), torch.tensor(500.0)
    graph_module = normalize(capture(Noisy(), (x, t)).graph_module)
    made = split(graph_module, [node(graph_module, "cos")])
    torch.manual_seed(0)
    *expected, value = made.full(x, t)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    results = made.skip(x, t, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    assert [r.stride() for r in results] == [r.stride() for r in expected]
    assert results[1].data_ptr() == results[0].data_ptr() and results[2] is x
    results[0].zero_()
    expected[0].zero_()
    assert not results[1].any() and value.all()


def test_a_look_at_an_early_value_draws_nothing():
    graph_module = normalize(capture(Noisy(), (torch.ones(2, 3), torch.tensor(500.0))).graph_module)
    early = subgraph(graph_module, [node(graph_module, "mul")])
    state = torch.get_rng_state()
    early(torch.ones(2, 3), torch.tensor(500.0))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="would do a second time: give another schedule"):
        subgraph(graph_module, [node(graph_module, "cos")])
