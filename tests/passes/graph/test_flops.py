"""FLOPs of a graph's nodes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.flops import flops
from fxstream.passes.graph.normalize import normalize
from tests.denoiser import Denoiser, latent


def test_as_torch_counts_a_run():
    model, args = Denoiser().eval(), (latent(), torch.tensor(500.0))
    graph_module = normalize(capture(model, args).graph_module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    assert sum(flops(graph_module).values()) == counter.get_total_flops() > 0


def test_attention_that_torch_has_no_formula_for():
    """That of the CPU's kernel."""

    class Attention(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    args = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 32, 8)
    counted = flops(normalize(capture(Attention(), args).graph_module))
    assert sum(counted.values()) == 2 * 3 * 16 * 32 * 8 * 2 * 2  # two products, an addition for each multiplication
