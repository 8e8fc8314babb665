"""FLOPs of a graph's nodes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxstream.passes.capture import capture
from fxstream.passes.flops import flops
from fxstream.passes.normalize import normalize
from tests.denoiser import Denoiser, latent


def test_as_torch_counts_a_run():
    """The CPU's attention apart, for which torch has no formula."""
    model, args = Denoiser().eval(), (latent(), torch.tensor(500.0))
    graph_module = normalize(capture(model, args).graph_module)
    counted = flops(graph_module)
    attention = sum(count for node, count in counted.items() if "attention" in node.name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    assert attention > 0
    assert sum(counted.values()) - attention == counter.get_total_flops()


def test_attention():
    class Attention(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    args = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 32, 8)
    counted = flops(normalize(capture(Attention(), args).graph_module))
    assert sum(counted.values()) == 2 * 3 * 16 * 32 * 8 * 2 * 2  # two products, an addition for each multiplication
