"""Numbers: floats that a graph takes as values, and what makes one part of what a plan is made for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxstream
from fxstream.passes.graph.capture import capture


class Scaled(nn.Module):
    """A module whose forward is ``f(self, x, **kwargs)`` and that keeps scales by name."""

    def __init__(self, f, scale=0.7):
        super().__init__()
        self.f, self.scales = f, {"a": scale}
        self.inner = nn.Linear(16, 64).requires_grad_(False)

    def forward(self, x, **kwargs):
        return self.f(self, x, **kwargs)


def held(model, x):
    return torch.relu(model.inner(x)).sum(-1, keepdim=True) * model.scales["a"] + x / model.scales["a"]


def given(model, x, scale=1.0, options=None):
    options = options or {"of": [1.0]}
    return torch.relu(model.inner(x)) * scale - options["of"][0]


def plans(model, calls, dtype=torch.float32):
    """The number of plans of some calls, each held to the model's own."""
    model.to(dtype)
    streamed, x = fxstream.optimize(model, memory_budget="min"), torch.randn(64, 16).to(dtype)
    for change, kwargs in calls:
        change(model)
        found, expected = streamed(x, **kwargs), model(x, **kwargs)
        assert found.dtype is dtype and near(found, expected)
    return len(streamed.plans)


def near(found, expected):
    distance = (found.double() - expected.double()).norm() / expected.double().norm()
    return distance <= 1e-6 if found.dtype is torch.float32 else distance <= 4e-3


def setting(scale):
    return lambda model: model.scales.update(a=scale)


def nothing(model):
    pass


SCALES = (0.7, 1.0, 0.3, 1 / 3, -2.0, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_that_a_model_keeps_share_a_plan(dtype):
    assert plans(Scaled(held), [(setting(scale), {}) for scale in SCALES], dtype) == 1


def test_numbers_among_the_arguments_share_a_plan():
    calls = [(nothing, {"scale": scale, "options": {"of": [scale * 2]}}) for scale in SCALES]
    assert plans(Scaled(given), calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_graph_computes_what_the_model_does_to_the_last_bit(dtype):
    model, x = Scaled(held).to(dtype), torch.randn(64, 16).to(dtype)
    captured = capture(model, (x,), lifting=True)
    for scale in SCALES:
        model.scales["a"] = scale
        [found] = captured.graph_module(x, torch.tensor([scale], dtype=torch.float64))
        assert torch.equal(found, model(x))


def test_arithmetic_of_numbers_is_done_in_the_graph():
    def f(model, x, weight=1.0):
        return model.inner(x) * (2 * model.scales["a"] / weight - 0.25)

    calls = [(setting(scale), {"weight": weight}) for scale, weight in zip(SCALES, reversed(SCALES), strict=True)]
    assert plans(Scaled(f), calls) == 1


def test_what_a_comparison_answers_is_part_of_a_plan():
    def f(model, x, scale=1.0):
        return model.inner(x) if scale == 1 else model.inner(x) * scale

    assert plans(Scaled(f), [(nothing, {"scale": scale}) for scale in (0.5, 1.0, 0.25, 1.0, 2.0)]) == 2
    off = Scaled(lambda model, x: model.inner(x) * model.scales["a"] if model.scales["a"] else model.inner(x))
    assert plans(off, [(setting(scale), {}) for scale in (0.5, 0.0, 0.25, -0.0, 2.0)]) == 2


@pytest.mark.parametrize(
    "f",
    [
        lambda model, x: model.inner(x) * math.sqrt(model.scales["a"]),
        lambda model, x: model.inner(x) * model.scales["a"] ** 2,
        lambda model, x: model.inner(x) + torch.full((64,), model.scales["a"]),
        lambda model, x: nn.functional.layer_norm(model.inner(x), (64,), eps=model.scales["a"]),
        lambda model, x: model.inner(x).clamp(max=model.scales["a"]),
        lambda model, x: model.inner(x) * torch.tensor([model.scales["a"]]),
        lambda model, x: model.inner(x) * (torch.arange(64) * model.scales["a"]),
        lambda model, x: model.inner(x) * (torch.ones(()) * model.scales["a"]),
        lambda model, x: model.inner(x) * float(f"{model.scales['a']:.3f}"),
        lambda model, x: model.inner(x) * int(model.scales["a"] * 10),
    ],
)
def test_any_other_use_makes_the_value_part_of_a_plan(f):
    assert plans(Scaled(f), [(setting(scale), {}) for scale in (0.7, 0.3, 0.7)]) == 2


def test_one_that_is_returned_is_the_models():
    def f(model, x):
        return model.inner(x) * model.scales["a"], model.scales["a"], {"of": model.scales["a"]}

    model, x = Scaled(f), torch.randn(8, 16)
    streamed = fxstream.optimize(model, memory_budget=0.9)
    for scale in (0.7, 0.3):
        model.scales["a"] = scale
        _, returned, inside = streamed(x)
        assert type(returned) is float and returned == scale and inside == {"of": scale} and type(inside["of"]) is float


def test_numbers_that_a_forward_sets_are_set():
    def f(model, x, weight=0.3):
        model.scales["a"] *= weight
        y = model.inner(x) * model.scales["a"]
        model.scales["a"] /= weight
        return y

    model, own = Scaled(f), Scaled(f)
    own.load_state_dict(model.state_dict())
    streamed, x = fxstream.optimize(model, memory_budget=0.9), torch.randn(8, 16)
    for weight in (0.3, 0.7, 1e-3, 0.1, 1 / 3) * 4:
        assert near(streamed(x, weight=weight), own(x, weight=weight))
        assert model.scales == own.scales and type(model.scales["a"]) is float
    assert len(streamed.plans) == 1


def test_one_that_moves_at_each_call_is_a_value():
    def f(model, x):
        y = model.inner(x) * model.scales["a"]
        model.scales["a"] = model.scales["a"] * 0.5
        return y

    model, own = Scaled(f), Scaled(f)
    own.load_state_dict(model.state_dict())
    streamed, x = fxstream.optimize(model, memory_budget=0.9), torch.randn(8, 16)
    for _ in range(4):
        assert near(streamed(x), own(x)) and model.scales == own.scales
    assert len(streamed.plans) == 1


def test_while_a_model_is_traced_its_numbers_are_its_own():
    seen = []

    def f(model, x):
        seen.append(kept["a"])
        return model.inner(x) * model.scales["a"]

    model = Scaled(f)
    kept = model.scales
    capture(model, (torch.randn(8, 16),), lifting=True)
    assert model.scales == {"a": 0.7} and type(model.scales["a"]) is float
    assert all(type(value) is float for value in seen)


def test_a_list_put_in_the_place_of_another_is_read():
    model, x = Scaled(lambda model, x: model.inner(x) * model.scales["a"]), torch.randn(8, 16)
    streamed = fxstream.optimize(model, memory_budget=0.9)
    streamed(x)
    model.scales = {"a": 0.1}
    assert near(streamed(x), model(x)) and len(streamed.plans) == 1
    model.scales = {"a": 0.1, "b": 0.1}
    assert near(streamed(x), model(x)) and len(streamed.plans) == 2
