"""Cut: where the presets find it, and the fewest bytes."""

from __future__ import annotations

from itertools import combinations, pairwise

import networkx as nx
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from fxstream.passes.graph.capture import capture, module_path
from fxstream.passes.graph.flops import flops
from fxstream.passes.graph.liveness import bytes_of
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.cut import find_cut, first_joint
from fxstream.passes.rewriting.split import split
from fxstream.tools.catalogue import small
from tests.denoiser import Denoiser, latent


def graph_of(model, *args):
    graph_module = normalize(capture(model.eval(), args).graph_module)
    return graph_module, [node for node in graph_module.graph.nodes if node.op == "placeholder"]


@pytest.fixture(scope="module")
def denoiser():
    return graph_of(Denoiser(), latent(), torch.tensor(500.0))


@pytest.fixture(scope="module")
def svd():
    model, args, kwargs = small("svd-unet", frames=2, height=16, width=16, batch=1)
    graph_module = normalize(capture(model, args, kwargs).graph_module)
    return graph_module, [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def dependence(graph_module, cut):
    """Whether the skip graph's output depends on the first two inputs, and its share of the FLOPs."""
    skip = split(graph_module, cut).skip
    reaches = nx.DiGraph((read, node) for node in skip.graph.nodes for read in node.all_input_nodes)
    output = skip.graph.output_node()
    inputs = [node for node in skip.graph.nodes if node.op == "placeholder"][:2]
    dependent = [node in reaches and nx.has_path(reaches, node, output) for node in inputs]
    return dependent, sum(flops(skip).values()) / sum(flops(graph_module).values())


class TestPresets:
    def test_paper_is_after_the_last_block(self, denoiser, svd):
        for (graph_module, inputs), path in ((denoiser, "up_blocks.2"), (svd, "up_blocks.3.attentions.1")):
            (node,) = find_cut(graph_module, "paper", *inputs[:2])
            assert module_path(node) == path

    def test_the_papers_cut_sees_neither_latent_nor_timestep(self, svd):
        """A skipped step returns the last full step's output again."""
        graph_module, inputs = svd
        dependent, share = dependence(graph_module, find_cut(graph_module, "paper", *inputs[:2]))
        assert dependent == [False, False]
        assert share < 0.01

    def test_deepcache_is_below_a_skip_connection(self, denoiser, svd):
        for branch, path in enumerate(("up_blocks.1", "up_blocks.0", "mid_block")):
            graph_module, inputs = denoiser
            (node,) = find_cut(graph_module, "deepcache", *inputs[:2], branch=branch)
            # What is resized between two blocks is below the connection as well.
            assert module_path(node) == path or module_path(node.all_input_nodes[0]) == path
        graph_module, inputs = svd
        (node,) = find_cut(graph_module, "deepcache", *inputs[:2])
        assert module_path(node) == "up_blocks.3.attentions.0"
        dependent, _ = dependence(graph_module, [node])
        assert dependent == [True, True]

    def test_auto_depends_on_both_within_its_share(self, denoiser, svd):
        for graph_module, inputs in (denoiser, svd):
            for keep in (0.2, 0.5):
                dependent, share = dependence(graph_module, find_cut(graph_module, "auto", *inputs[:2], keep=keep))
                assert dependent == [True, True]
                assert share <= keep

    def test_auto_holds_no_more_than_deepcache(self, svd):
        graph_module, inputs = svd
        sizes = [
            sum(bytes_of(node.meta["val"]) for node in find_cut(graph_module, where, *inputs[:2], keep=0.4))
            for where in ("auto", "deepcache")
        ]
        assert sizes[0] <= sizes[1]


def test_a_transformer_of_residual_blocks():
    """Auto holds what each block adds to the stream, a block's name the stream."""
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16}
    model = WanTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, rope_max_seq_len=8, **config)
    tensors = torch.randn(1, 4, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 3, 16)
    graph_module, inputs = graph_of(model, *tensors)
    auto, block = (find_cut(graph_module, where, *inputs[:2]) for where in ("auto", "blocks.1"))
    assert {"blocks.0", "blocks.1", "blocks.2"} <= {".".join(module_path(node).split(".")[:2]) for node in auto}
    assert dependence(graph_module, auto)[0] == [True, True]
    assert len(block) == 1
    assert dependence(graph_module, block)[0] == [False, True]


class Ladder(nn.Module):
    """Layers of several widths in a row, the latent and the time added again before the last."""

    def __init__(self, widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.again = nn.Linear(widths[0], widths[-2], bias=False)

    def forward(self, sample, timestep):
        x = sample
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x + self.again(sample) + timestep)


@pytest.mark.parametrize("widths", [(8, 64, 16, 32, 64, 4), (8, 32, 8, 64, 16, 8), (8, 64, 64, 8, 64, 8)])
def test_auto_is_the_fewest_bytes(widths):
    """Against every set of at most two values."""
    graph_module, inputs = graph_of(Ladder(widths), torch.randn(3, widths[0]), torch.tensor(5.0))
    cut = find_cut(graph_module, "auto", *inputs, keep=0.6)
    held = sum(bytes_of(node.meta["val"]) for node in cut)
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    found = []
    for values in [*combinations(calls, 1), *combinations(calls, 2)]:
        try:
            dependent, share = dependence(graph_module, values)
        except ValueError:
            continue
        if all(dependent) and share <= 0.6:
            found.append(sum(bytes_of(node.meta["val"]) for node in values))
    assert held == min(found)


def test_auto_leaves_nothing_to_compute_that_follows_from_the_cut_alone():
    """Of the values of 16 channels that are equally small, the last before the latent comes in again."""
    graph_module, inputs = graph_of(Ladder((8, 64, 16, 16, 16, 4)), torch.randn(3, 8), torch.tensor(5.0))
    (cut,) = find_cut(graph_module, "auto", *inputs, keep=0.6)
    assert cut.target is torch.ops.aten.relu.default
    assert [user.target for user in cut.users] == [torch.ops.aten.add.Tensor]


def test_a_node_and_a_module(denoiser):
    graph_module, inputs = denoiser
    (leaving,) = find_cut(graph_module, "down_blocks.2", *inputs[:2])
    assert find_cut(graph_module, leaving.name, *inputs[:2]) == (leaving,)


def test_the_early_value_depends_on_both(denoiser, svd):
    for (graph_module, inputs), path in ((denoiser, "down_blocks.0"), (svd, "down_blocks.0.resnets.0")):
        node = first_joint(graph_module, *inputs[:2])
        assert module_path(node).startswith(path)


class TestErrors:
    def test_a_cut_that_does_not_exist(self, denoiser):
        graph_module, inputs = denoiser
        with pytest.raises(ValueError, match=r"there is no cut 'up_blocks.9'.*up_blocks.2"):
            find_cut(graph_module, "up_blocks.9", *inputs[:2])

    def test_a_branch_that_does_not_exist(self, denoiser):
        graph_module, inputs = denoiser
        with pytest.raises(ValueError, match=r"branch 3 of cut='deepcache' does not exist: the model has 3"):
            find_cut(graph_module, "deepcache", *inputs[:2], branch=3)

    def test_a_model_without_skips_or_blocks(self):
        graph_module, inputs = graph_of(Ladder((8, 8, 8)), torch.randn(3, 8), torch.tensor(5.0))
        with pytest.raises(ValueError, match="no skip connection"):
            find_cut(graph_module, "deepcache", *inputs)
        with pytest.raises(ValueError, match="no list of blocks"):
            find_cut(graph_module, "paper", *inputs)

    def test_a_share_that_is_too_small(self, denoiser):
        graph_module, inputs = denoiser
        with pytest.raises(ValueError, match=r"at 0% of the model's FLOPs: the cheapest way takes"):
            find_cut(graph_module, "auto", *inputs[:2], keep=0.0001)
