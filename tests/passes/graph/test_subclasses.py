"""Weights of a class of their own: captured as what they hold, and as their class to the model's code."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fxstream
from fxstream.errors import CaptureError
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.subclasses import fake_like, plain_tensors, weights_of


class Scaled(torch.Tensor):
    """Whole numbers and a factor for each row, seen as their product."""

    @staticmethod
    def __new__(cls, whole, factor):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=factor.dtype, device=whole.device)

    def __init__(self, whole, factor):
        self.whole, self.factor = whole, factor

    def __tensor_flatten__(self):
        return ["whole", "factor"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Scaled(inner["whole"], inner["factor"])

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Scaled(op(args[0].whole), op(args[0].factor))
        plain = torch.utils._pytree.tree_map_only(Scaled, lambda x: x.whole * x.factor, (args, kwargs or {}))
        return op(*plain[0], **plain[1])


class Halved(nn.Parameter):
    """Twice a weight, and what to divide by: functions of torch make their results of this class, too."""

    def __new__(cls, data, by=2.0):
        self = torch.Tensor._make_subclass(cls, data, False)
        self.by = by
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        by = next(x.by for x in args if isinstance(x, Halved))
        return cls(result, by) if isinstance(result, torch.Tensor) else result

    def real(self):
        return torch.Tensor._make_subclass(torch.Tensor, self, False) / self.by


class Deaf(torch.Tensor):
    """Answers for every operator, and does not tell what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return op(*torch.utils._pytree.tree_map_only(Deaf, lambda x: x.held, args), **(kwargs or {}))


class Wide(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.weight = nn.Parameter(kind(), requires_grad=False)

    def forward(self, x):
        return torch.relu(x @ self.weight.t()).sum(-1)


class Told(nn.Module):
    """Asks its weight for its class, its attribute and its method."""

    def __init__(self):
        super().__init__()
        self.weight = Halved(torch.randn(64, 16))

    def forward(self, x):
        assert isinstance(self.weight, Halved) and isinstance(self.weight[:4], Halved)
        return torch.relu(x @ self.weight.real().t()).sum(-1) * self.weight.by


def scaled() -> Scaled:
    return Scaled(torch.randint(-8, 8, (64, 16)).float(), torch.rand(64, 1))


def names(captured):
    return {str(node.target) for node in captured.graph_module.graph.find_nodes(op="get_attr")}


def test_a_weight_that_holds_others_is_captured_as_these():
    model, x = Wide(scaled), torch.randn(8, 16)
    captured = capture(model, (x,))
    assert names(captured) == {"model.weight.whole", "model.weight.factor"}
    assert torch.equal(captured.graph_module(x)[0], model(x))
    assert [path for path, _ in plain_tensors(model.weight)] == [".whole", ".factor"]
    assert [*map(id, weights_of(model))] == [id(model.weight.whole), id(model.weight.factor)]


def test_it_is_streamed_and_what_is_written_into_it_is_seen():
    model, x = Wide(scaled), torch.randn(256, 16)
    streamed = fxstream.optimize(model, memory_budget=0.5)
    assert torch.allclose(streamed(x), model(x), atol=1e-5)
    assert streamed.plans[0].weight_bytes == 64 * 16 * 4 + 64 * 4
    model.weight.factor.mul_(3)
    assert torch.allclose(streamed(x), model(x), atol=1e-5) and len(streamed.plans) == 1


def test_one_that_requires_a_gradient_is_captured():
    model, x = (
        Wide(lambda: Scaled(torch.randint(-8, 8, (64, 16), dtype=torch.int8), torch.rand(64, 1))),
        torch.rand(8, 16),
    )
    model.weight.requires_grad_(True)
    with torch.no_grad():
        assert torch.allclose(fxstream.optimize(model, memory_budget=0.5)(x), model(x))
    assert model.weight.requires_grad


def test_a_plain_one_is_of_its_class_to_the_model():
    model, x = Told(), torch.randn(256, 16)
    streamed = fxstream.optimize(model, memory_budget=0.5)
    found = streamed(x)
    assert type(found) is torch.Tensor and torch.allclose(found, model(x))
    assert type(model.weight) is Halved and set(vars(model.weight)) == {"by"}


def test_its_attributes_are_part_of_what_a_plan_is_made_for():
    model, x = Told(), torch.randn(256, 16)
    streamed = fxstream.optimize(model, memory_budget=0.5)
    streamed(x)
    model.weight.by = 4.0
    assert torch.allclose(streamed(x), model(x), atol=1e-5) and len(streamed.plans) == 2
    model.weight.by = 2.0
    assert torch.allclose(streamed(x), model(x), atol=1e-5) and len(streamed.plans) == 2


def test_what_a_forward_sets_in_one_is_set_after_a_call():
    class Counting(Told):
        def forward(self, x):
            self.weight.shape_seen = tuple(x.shape)
            return super().forward(x)

    model, x = Counting(), torch.randn(256, 16)
    streamed = fxstream.optimize(model, memory_budget=0.5)
    assert torch.allclose(streamed(x), Told.forward(model, x)) and model.weight.shape_seen == (256, 16)
    assert not any(isinstance(value, FakeTensor) for value in vars(model.weight).values())


def test_tensors_in_attributes_are_weights():
    model = Told()
    model.weight.scale = {"of": [torch.ones(3)]}
    assert sum(tensor.nbytes for tensor in weights_of(model)) == 64 * 16 * 4 + 12


def test_one_that_does_not_tell_what_it_holds_is_refused_by_name():
    model = Wide(scaled)
    model._parameters["weight"] = Deaf(torch.randn(64, 16))
    with pytest.raises(CaptureError, match=r"weight is a Deaf, which answers for every operator"):
        capture(model, (torch.randn(8, 16),))


def test_without_memory_they_are_of_their_class_too():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    wrapped, plain = (
        fake_like(nn.Parameter(scaled(), requires_grad=False), mode),
        fake_like(Halved(torch.ones(2)), mode),
    )
    assert isinstance(wrapped, Scaled) and isinstance(wrapped.whole, FakeTensor)
    assert isinstance(plain, Halved) and isinstance(plain, FakeTensor) and plain.by == 2.0
    model = Told()
    model.weight = fake_like(model.weight, mode)
    with mode:
        x = torch.randn(256, 16)
    assert fxstream.plan(model, (x,), memory_budget=0.5).after.peak_bytes > 0
    assert isinstance(model.weight, Halved)


def test_inputs_of_a_class_of_their_own_go_through_a_graph_of_plain_weights():
    class Kept(torch.Tensor):
        pass

    model = nn.Linear(16, 16).requires_grad_(False)
    streamed, x = fxstream.optimize(model, memory_budget="min"), torch.randn(8, 16).as_subclass(Kept)
    assert type(streamed(x)) is type(model(x)) is Kept
