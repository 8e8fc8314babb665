"""Twin: another structure over the same weights, in which a model's own modules are found no more."""

from __future__ import annotations

import functools

import torch
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.twin import Twin


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.again = self.inner
        self.lists = {"deep": [(self.inner, 1)], "itself": []}
        self.lists["itself"].append(self.lists)
        self.plain = [1, 2]
        self.partial = functools.partial(Model.forward, self)
        self.inner.forward = self.inner.forward
        self.register_buffer("kept", torch.ones(3))

    def forward(self, x):
        self.last = x
        self.kept.add_(1)
        return self.inner(x) * self.kept


def test_modules_are_others_and_weights_are_the_same():
    model = Model()
    twin = Twin(model)
    copy = twin.module
    assert type(copy) is Model and copy is not model and copy.inner is not model.inner and copy.again is copy.inner
    assert copy.inner.weight is model.inner.weight and copy.kept is model.kept and copy.plain is model.plain
    assert copy.lists["deep"][0] == (copy.inner, 1) and copy.lists is not model.lists
    assert copy.partial.args == (copy,) and copy.inner.forward.__self__ is copy.inner
    assert twin.of(model.forward) == copy.forward and twin.of(5) == 5
    copy.inner.weight = None
    assert model.inner.weight is not None and not hasattr(model, "last")


def test_a_capture_leaves_the_model_alone():
    model, x = Model(), torch.randn(2, 3)
    del model.lists["itself"]
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def look(module, args):
        found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert module is not model and found.keys() == weights.keys()
        assert all(found[name] is weights[name] for name in found)

    model.register_forward_pre_hook(look)
    captured = capture(model, (x,))
    assert not hasattr(model, "last") and model.kept.sum() == 3
    assert torch.equal(captured.graph_module(x)[0], model.inner(x) * 2)
