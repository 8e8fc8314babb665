"""Casts: a forward that casts its weights to compute with, and back."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

import fxstream
from fxstream.errors import CaptureError
from fxstream.passes.graph.capture import capture


class Casting(nn.Module):
    def __init__(self, storage, back=None):
        super().__init__()
        self.inner = nn.Linear(16, 64).requires_grad_(False).to(storage)
        self.back = back or storage

    def forward(self, x):
        self.inner.to(x.dtype)
        y = torch.relu(self.inner(x)).sum(-1)
        self.inner.to(self.back)
        return y


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_what_is_cast_back_is_the_weight_again(storage):
    model, x = Casting(storage), torch.randn(64, 16)
    captured = capture(model, (x,))
    assert model.inner.weight.dtype is storage and not captured.state
    assert torch.equal(captured.graph_module(x)[0], model(x))


def test_a_cast_that_loses_numbers_is_refused():
    with pytest.raises(CaptureError, match=r"forward sets the parameter inner\.weight"):
        capture(Casting(torch.float32, torch.bfloat16), (torch.randn(64, 16),))


def test_layers_of_diffusers_that_cast_by_hooks_are_streamed():
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).requires_grad_(False)
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    x = torch.randn(256, 16)
    streamed = fxstream.optimize(model, memory_budget=0.5)
    assert torch.allclose(streamed(x), model(x), atol=1e-5) and model[0].weight.dtype is torch.float8_e4m3fn
    assert streamed.plans[0].weight_bytes == 2 * 16 * 64 + 64 + 16
