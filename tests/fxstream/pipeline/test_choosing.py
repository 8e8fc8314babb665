"""Pipelines whose denoiser branches on data: it runs as it is, its blocks streamed."""

import pytest
import torch
from torch import nn

import fxstream
from fxstream.errors import CaptureError
from tests.fxstream.pipeline.pipelines import Denoiser, toy


class Inner(nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.up, self.down = denoiser.up, denoiser.down

    def forward(self, x, shift, scale):
        return x + self.down(nn.functional.gelu(self.up(x + shift) * scale))


class Choosing(Denoiser):
    """As the other, its middle a module of its own; it looks at what it is given."""

    def forward(self, hidden_states, timestep, prompt_embeds, return_dict=False):
        x = hidden_states.movedim(1, -1)
        scale = 1 + timestep.to(x.dtype) / 1000
        y = self.inner(x, prompt_embeds.mean(), scale) if x.abs().max() > 0 else x
        return (y.movedim(-1, 1),)


def choosing():
    pipeline = toy()
    pipeline.denoiser.__class__ = Choosing
    pipeline.denoiser.inner = Inner(pipeline.denoiser)
    return pipeline


def generate(pipeline):
    return pipeline("a cat", generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:Choosing is no single graph")
@pytest.mark.parametrize("budget", ["min", "1GiB"])
def test_it_is_streamed_by_its_blocks(budget):
    expected = generate(choosing())
    pipeline = fxstream.optimize(choosing(), memory_budget=budget)
    found = generate(pipeline)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert pipeline.denoiser.plans
    assert "denoiser" in {stage.name for stage in fxstream.plan(pipeline).stages} or budget == "min"
    assert generate(fxstream.restore(pipeline)).equal(expected)


def test_a_single_graph_can_be_asked_for():
    pipeline = fxstream.optimize(choosing(), memory_budget="min", fullgraph=True)
    with pytest.raises(CaptureError, match="data-dependent"):
        generate(pipeline)
