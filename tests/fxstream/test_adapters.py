"""Adapters: scales are values of a plan, and a set of adapters that was there before has its plan."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

import fxstream

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 32, "ffn_dim": 128}
    made = WanTransformer3DModel(**sizes, in_channels=4, out_channels=4).eval().requires_grad_(False)
    for name in ("one", "other"):
        made.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
    made.set_adapter("one")
    return made


@pytest.fixture
def call():
    made = torch.Generator().manual_seed(1)
    video, prompt = torch.randn(1, 4, 3, 8, 8, generator=made), torch.randn(1, 8, 32, generator=made)
    timestep = torch.tensor([500])
    return {"hidden_states": video, "timestep": timestep, "encoder_hidden_states": prompt, "return_dict": False}


def same(streamed, model, **call):
    found, expected = streamed(**call)[0], model(**call)[0]
    return bool((found - expected).norm() <= 1e-6 * expected.norm())


def test_scales_are_values_of_one_plan(model, call):
    streamed = fxstream.optimize(model, memory_budget=0.9)
    for scale in (1.0, 0.5, 0.25, 0.0, -1.0, 2.0, 0.1, 0.7, 1 / 3, 1.0):
        model.set_adapters("one", scale)
        assert same(streamed, model, **call)
    assert len(streamed.plans) == 1


def test_scales_given_with_a_call_are_values_too(model, call):
    streamed = fxstream.optimize(model, memory_budget=0.9)
    for scale in (0.5, 0.25, 0.7, 1.0, 0.3, 1.0):
        assert same(streamed, model, **call, attention_kwargs={"scale": scale})
    assert len(streamed.plans) == 2  # one for a scale of 1, which the model leaves out


def test_each_set_of_adapters_has_a_plan_that_is_found_again(model, call):
    streamed = fxstream.optimize(model, memory_budget=0.9)
    ways = [
        lambda: model.set_adapters("one", 0.5),
        lambda: model.set_adapters("other", 0.7),
        lambda: model.set_adapters(["one", "other"], [0.3, 0.4]),
        model.disable_adapters,
    ]
    for way in ways:
        way()
        assert same(streamed, model, **call)
        model.enable_adapters()
    assert len(streamed.plans) == len(ways)
    for way in ways:
        way()
        assert same(streamed, model, **call)
        model.enable_adapters()
    model.set_adapters(["one", "other"], [0.1, 0.9])
    assert same(streamed, model, **call)
    assert len(streamed.plans) == len(ways)


def test_fused_and_unfused(model, call):
    streamed = fxstream.optimize(model, memory_budget=0.9)
    for way in (lambda: None, model.fuse_lora, model.unfuse_lora, model.fuse_lora, model.unfuse_lora):
        way()
        assert same(streamed, model, **call)
    assert len(streamed.plans) == 2
