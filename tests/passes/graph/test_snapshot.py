import collections
import enum
import functools
import types
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fxstream.passes.graph.places import describe, owner_of, put, value_at
from fxstream.passes.graph.snapshot import Snapshot, environment, roots_of


class Plain:
    shared = 1.0

    def __init__(self):
        self.scale = 1.0


@dataclass(slots=True)
class Slotted:
    scale: float = 1.0


class MyList(list):
    pass


class Mode(enum.Enum):
    A = 1
    B = 2


class Model(nn.Module):
    options: ClassVar = {"a": [1.0]}

    def __init__(self, value=None):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.kept = value
        self.hidden = [nn.Linear(3, 3)]

    def forward(self, x):
        return self.conv(x)


def closed_over():
    inside = {"a": 1.0}
    return (lambda: inside["a"]), inside


FUNCTION, INSIDE = closed_over()

CHANGES = {
    "list in a list": ([[1.0]], lambda v: v[0].append(2.0)),
    "dict in a tuple": (({"a": 1.0},), lambda v: v[0].update(a=2.0)),
    "deque": (collections.deque([1.0, 2.0]), lambda v: v.rotate()),
    "defaultdict": (collections.defaultdict(list), lambda v: v["a"]),
    "order of a dict": ({"a": 1, "b": 2}, lambda v: v.update(a=v.pop("a"))),
    "order of an OrderedDict": (collections.OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
    "key of a dict": ({"a": 1}, lambda v: v.update(b=v.pop("a"))),
    "set": ({1}, lambda v: v.add(2)),
    "ChainMap": (collections.ChainMap({"a": 1}), lambda v: v.update(a=2)),
    "list of a class of its own": (MyList([1.0]), lambda v: v.append(1)),
    "object": (Plain(), lambda v: setattr(v, "scale", 2.0)),
    "object in a list in an object": (types.SimpleNamespace(a=[Plain()]), lambda v: setattr(v.a[0], "scale", 2.0)),
    "slots": (Slotted(), lambda v: setattr(v, "scale", 2.0)),
    "class of an object": ([Plain()], lambda v: setattr(v[0], "__class__", type("Other", (Plain,), {}))),
    "partial": (functools.partial(print, [1]), lambda v: v.args[0].append(2)),
    "closure": (FUNCTION, lambda v: INSIDE.update(a=2.0)),
    "default": (lambda a={"b": 1}: a, lambda v: v.__defaults__[0].update(b=2)),
    "bound method": (types.MethodType(lambda self: 1, Plain()), lambda v: setattr(v.__self__, "scale", 2.0)),
    "array": (np.zeros(2), lambda v: v.__setitem__(0, 1)),
    "bytes": (bytearray(2), lambda v: v.__setitem__(0, 1)),
    "int for a float": ([2.0], lambda v: v.__setitem__(0, 2)),
    "bool for an int": ([1], lambda v: v.__setitem__(0, True)),
    "sign of zero": ([0.0], lambda v: v.__setitem__(0, -0.0)),
    "enum": ([Mode.A], lambda v: v.__setitem__(0, Mode.B)),
    "tensor": ([torch.ones(2)], lambda v: v.__setitem__(0, torch.ones(2))),
    "data of a tensor": ([torch.ones(2)], lambda v: setattr(v[0], "data", torch.ones(2))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_in_a_value_is_seen_and_taken_back(name):
    value, change = CHANGES[name]
    roots = roots_of(Model(value))
    before = Snapshot(roots)
    key = before.key()
    assert before.holds()
    assert Snapshot(roots).key() == key and hash(Snapshot(roots).key()) == hash(key)
    change(value)
    assert not before.holds()
    assert Snapshot(roots).key() != key
    if name not in ("class of an object", "data of a tensor"):  # which no forward does
        before.rewind()
        assert Snapshot(roots).key() == key


MODEL_CHANGES = {
    "layout of weights": lambda m: m.to(memory_format=torch.channels_last),
    "shape of a weight": lambda m: setattr(m.conv.weight, "data", torch.ones(5, 4, 3, 3)),
    "strides of a weight": lambda m: setattr(m.conv.weight, "data", torch.ones(3, 3, 4, 4).permute(2, 3, 0, 1)),
    "offset of a weight": lambda m: setattr(m.conv.weight, "data", torch.ones(145)[1:].view(4, 4, 3, 3)),
    "dtype of a weight": lambda m: m.conv.double(),
    "device of a weight": lambda m: m.conv.to("meta"),
    "requires_grad": lambda m: m.conv.requires_grad_(False),
    "weights tied": lambda m: setattr(m, "again", m.conv),
    "attribute of torch's": lambda m: setattr(m.conv, "padding", (1, 1)),
    "training": lambda m: m.conv.train(not m.conv.training),
    "hook": lambda m: m.conv.register_forward_hook(lambda *_: None),
    "hook with keywords": lambda m: m.conv.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "forward of an instance": lambda m: setattr(m.conv, "forward", lambda x: x),
    "a weight of a hidden module": lambda m: setattr(m.hidden[0].weight, "data", torch.ones(3, 3)),
    "a hook of a hidden module": lambda m: m.hidden[0].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_what_is_changed_in_a_model_is_seen(name):
    model = Model()
    before = Snapshot(roots_of(model))
    key = before.key()
    assert before.holds() and before.holds()  # the second time by what the first has made ready
    MODEL_CHANGES[name](model)
    assert not before.holds()
    assert Snapshot(roots_of(model)).key() != key


def test_what_is_set_to_what_it_is_holds_in_every_mode():
    model = Model({"a": [1.0]})
    before = Snapshot(roots_of(model))
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.enable_grad()):
        with context:
            model.kept, model.kept["a"] = model.kept, model.kept["a"]
            model.conv.padding, model.hidden[0].bias = model.conv.padding, model.hidden[0].bias
            assert before.holds() and before.holds()
            model.conv.stride = (2, 2)
            assert not before.holds()
            del model.conv.stride
            assert not before.holds()
            model.conv.stride = before.nodes[id(model.conv)].parts["attribute", "stride"]
            assert before.holds()


@pytest.mark.parametrize(
    ("owner", "name"), [(Model, "forward"), (nn.Conv2d, "forward"), (Plain, "shared"), (Model, "options")]
)
def test_what_is_changed_in_a_class_is_seen(owner, name, monkeypatch):
    roots = roots_of(Model(Plain()))
    before = Snapshot(roots)
    key = before.key()
    monkeypatch.setattr(owner, name, lambda *_: 3.0)
    assert not before.holds()
    assert Snapshot(roots).key() != key


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_of_all_modules_are_seen(register):
    before = Snapshot(roots_of(Model()))
    handle = register(lambda *_: None)
    assert not before.holds()
    handle.remove()
    assert before.holds()


def test_a_hook_set_anew_is_the_same():
    model = Model()

    def hook(module, args, output):
        return None

    handle = model.conv.register_forward_hook(hook, with_kwargs=False)
    key = Snapshot(roots_of(model)).key()
    handle.remove()
    model.conv.register_forward_hook(hook)
    assert Snapshot(roots_of(model)).key() == key


def test_weights_go_by_their_layouts_and_other_tensors_by_themselves():
    model = Model([torch.ones(2)])
    snapshot = Snapshot(roots_of(model))
    key, live = snapshot.key(), [(("root", "model"), ("attribute", "kept"))]
    loose = snapshot.key(live=live)
    model.conv.weight.data = torch.randn(4, 4, 3, 3)
    assert Snapshot(roots_of(model)).key() == key
    model.kept[0] = torch.zeros(2)
    assert Snapshot(roots_of(model)).key() != key
    assert Snapshot(roots_of(model)).key(live=live) == loose
    model.kept[0] = torch.zeros(3)
    assert Snapshot(roots_of(model)).key(live=live) != loose


def test_the_values_of_tensors_that_were_asked_for_them():
    model = Model(torch.ones(2))
    place = (("root", "model"), ("attribute", "kept"))
    loose, asked = Snapshot(roots_of(model)), Snapshot(roots_of(model), asked=[place])
    key = asked.key()
    model.kept.add_(1)
    assert loose.holds()
    assert not asked.holds()
    assert Snapshot(roots_of(model), asked=[place]).key() != key


def test_equal_models_have_equal_keys():
    assert (
        Snapshot(roots_of(nn.Sequential(nn.Linear(2, 2)))).key()
        == Snapshot(roots_of(nn.Sequential(nn.Linear(2, 2)))).key()
    )
    assert Snapshot(roots_of(nn.Linear(2, 2))).key() != Snapshot(roots_of(nn.Linear(2, 2).eval())).key()


def test_what_was_replaced_is_not_mistaken_for_what_replaces_it():
    """Though it is gone, and its id given to the other."""
    model = Model()
    keys = set()
    for _ in range(20):
        model.kept = object()
        keys.add(Snapshot(roots_of(model)).key())
    assert len(keys) == 20


def test_hidden_places_have_no_part_in_the_key():
    model = Model({"a": 1, "b": [2]})
    place = (("root", "model"), ("attribute", "kept"))
    hidden = [(*place, ("item", "a")), (*place, ("item", "b"), ("content", None))]
    key = Snapshot(roots_of(model)).key(hidden)
    model.kept["a"] = 3
    model.kept["b"].append(4)
    assert Snapshot(roots_of(model)).key(hidden) == key
    model.kept["c"] = 5
    assert Snapshot(roots_of(model)).key(hidden) != key


COUNTS = {"calls": 0}


def test_changes_name_places_and_what_was_there():
    class Counting(Model):
        def forward(self, x):
            COUNTS["calls"] += 1
            self.kept["log"].append(x)
            self.conv.padding = (1, 1)
            return x

    model = Counting({"log": [1], "same": [2]})
    roots = roots_of(model)
    before = Snapshot(roots, code=True)
    model(3)
    model.kept["same"] = [2]  # another list, of the same
    changes = {describe(c.place): (c.before, c.after, c.more) for c in before.changes(Snapshot(roots, code=True))}
    assert changes == {
        "kept['log']": ([1], [3], True),
        "conv.padding": ((0, 0), (1, 1), False),
        "COUNTS['calls']": (0, 1, False),
    }
    (padding,) = [c.place for c in before.changes(Snapshot(roots, code=True)) if describe(c.place) == "conv.padding"]
    assert owner_of(padding, roots) == ("conv", model.conv)
    put(padding, roots, (2, 2))
    assert model.conv.padding == value_at(padding, roots) == (2, 2)
    before.rewind()
    assert (COUNTS, model.kept, model.conv.padding) == ({"calls": 0}, {"log": [1], "same": [2]}, (0, 0))


@functools.lru_cache
def table(size):
    return torch.arange(size)


def test_what_a_cache_took_up_is_dropped():
    class Cached(nn.Module):
        def forward(self, x):
            return x + table(x.shape[0])

    model = Cached()
    before = Snapshot(roots_of(model), code=True)
    model(torch.zeros(3))
    assert table.cache_info().currsize
    before.rewind()
    assert not table.cache_info().currsize


def test_a_model_that_reaches_itself():
    model = Model([])
    model.kept += [model.kept, types.SimpleNamespace(model=(model,))]
    before = Snapshot(roots_of(model))
    assert before.key() == Snapshot(roots_of(model)).key()


def test_the_environment():
    plain = environment()
    assert environment() == plain
    for device in ("cpu", "cuda"):
        before = torch.is_autocast_enabled(device)
        torch.set_autocast_enabled(device, True)
        assert environment() != plain
        torch.set_autocast_enabled(device, before)
    torch.set_default_dtype(torch.float64)
    assert environment() != plain
    torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert environment() != plain
    assert environment() == plain
