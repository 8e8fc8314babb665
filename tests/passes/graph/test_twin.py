"""Twin: another structure over the same weights, in which a model's own modules are found no more."""

from __future__ import annotations

import functools
import weakref

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
    own = weakref.ref(model)  # what the hook's closure held would be the twin

    def look(module, args):
        found = {**dict(own().named_parameters()), **dict(own().named_buffers())}
        assert module is not own() and found.keys() == weights.keys()
        assert all(found[name] is weights[name] for name in found)

    model.register_forward_pre_hook(look)
    captured = capture(model, (x,))
    assert not hasattr(model, "last") and model.kept.sum() == 3
    assert torch.equal(captured.graph_module(x)[0], model.inner(x) * 2)


class Holder:
    """An object that leads back to a module, and to itself."""

    __slots__ = ("forward", "itself", "other")

    def __init__(self, module):
        self.forward, self.itself, self.other = module.forward, self, object()


def test_objects_and_closures_that_lead_to_a_module_are_copied():
    model = Model()
    holder = Holder(model.inner)

    def wrapped(*args):
        return holder.forward(*args)

    def beside(*args):
        return holder.forward(*args)

    model.wrapped, model.beside, model.alone, model.holder = wrapped, beside, Holder(nn.ReLU()), holder
    copy = Twin(model).module
    assert copy.holder is not holder and copy.holder.forward.__self__ is copy.inner
    assert copy.holder.itself is copy.holder and copy.holder.other is holder.other and copy.alone is model.alone
    assert copy.wrapped.__closure__[0].cell_contents is copy.holder and copy.wrapped is not wrapped
    assert copy.wrapped.__closure__[0] is copy.beside.__closure__[0] and copy.wrapped.__name__ == "wrapped"


def test_a_forward_that_a_closure_calls_is_of_the_twin():
    model, x = nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)
    own = model.forward
    model.forward = lambda x: own(x) * 2
    captured = capture(model, (x,))
    assert [str(node.target) for node in captured.graph_module.graph.find_nodes(op="get_attr")] == [
        "model.weight",
        "model.bias",
    ]
    model.weight.data.mul_(3)
    assert torch.equal(captured.graph_module(x)[0], model(x))
