import collections
import gc
import types
import weakref
from typing import NamedTuple

import pytest
import torch

from fxstream.passes.graph.structure import Made, flatten, unflatten

X = torch.ones(2)


class MyList(list):
    pass


class MyTuple(tuple):
    __slots__ = ()


class MyDict(dict):
    pass


class MyDefault(collections.defaultdict):
    pass


class Named(NamedTuple):
    a: torch.Tensor
    b: int = 3


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


class View(collections.abc.Mapping):
    def __init__(self, inside):
        self._inside = inside

    def __getitem__(self, name):
        return self._inside[name]

    def __iter__(self):
        return iter(self._inside)

    def __len__(self):
        return len(self._inside)


VALUES = {
    "list": (MyList([X, 3]), list),
    "tuple": (MyTuple([X]), list),
    "dict": (MyDict(a=X), dict),
    "defaultdict": (MyDefault(list, a=X), lambda v: (dict(v), v.default_factory)),
    "deque": (collections.deque([X], maxlen=3), lambda v: (list(v), v.maxlen)),
    "named tuple": (Named(X), lambda v: [v.a, v.b]),
    "mapping": (View({"a": [X]}), dict),
    "proxy": (types.MappingProxyType({"a": X}), dict),
    "UserDict": (collections.UserDict(a=X), dict),
    "ChainMap": (collections.ChainMap({"a": X}), dict),
    "slots": (Slotted([X]), lambda v: v.a),
    "namespace": (types.SimpleNamespace(a=types.SimpleNamespace(b=X)), lambda v: v.a.b),
    "nested": ({"a": MyList([MyDict(b=X)])}, lambda v: (type(v["a"][0]), v["a"][0]["b"])),
    "shape": ((X, X.shape), lambda v: [v[0], type(v[1]), v[1]]),
    "maximum": (X.view(1, 2).max(1), lambda v: [v.values, v.indices]),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_put_together_of_other_tensors(name):
    value, parts = VALUES[name]
    found = flatten(value)
    assert all(not isinstance(leaf, torch.Tensor) for leaf in found.rest)
    same = unflatten(*found)
    assert type(same) is type(value)
    assert repr(parts(same)) == repr(parts(value))
    others = flatten(unflatten([x + 1 for x in found.tensors], found.rest, found.spec)).tensors
    assert [x.tolist() for x in others] == [(x + 1).tolist() for x in found.tensors]


def test_what_is_made_is_made_anew():
    value = Made([1, [2]])
    _, rest, spec = flatten((X, 0))
    first, second = (unflatten([X], (rest[0], value), spec)[1] for _ in range(2))
    assert first == second == [1, [2]]
    assert first is not second and first[1] is not second[1]


def twice(kind):
    one = kind()
    return one, {"again": one, "other": kind()}


TWICE = {
    "list": lambda: twice(lambda: [X]),
    "empty list": lambda: twice(list),
    "dict in a list": lambda: twice(lambda: [{"a": X}])[::-1],
    "list of a class of its own": lambda: twice(lambda: MyList([X])),
    "object": lambda: twice(lambda: types.SimpleNamespace(a=X)),
    "object without tensors": lambda: twice(lambda: Made(types.SimpleNamespace(a=1))),
    "set": lambda: twice(lambda: Made({1})),
    "list in an object": lambda: (lambda one: (types.SimpleNamespace(a=one, b=[one]), one))([X]),
    "list in a list that is there twice": lambda: (lambda one: twice(lambda: [one, one]))([X]),
}


def identities(value, met):
    """For each container and object in a value, the number of the first that is the same."""
    if isinstance(value, torch.Tensor):
        return []
    if isinstance(value, Made):
        value = value.value
    inside = [*getattr(value, "__dict__", {}).values()]
    inside += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    number = met.setdefault(id(value), len(met)) if type(value) is not tuple else None
    return [number, *(each for part in inside for each in identities(part, met))]


@pytest.mark.parametrize("name", TWICE)
def test_what_is_in_a_value_twice_is_one(name):
    value = TWICE[name]()
    found = flatten(value)
    assert flatten(TWICE[name]()).spec == found.spec
    first, second = (unflatten(*found) for _ in range(2))
    assert identities(first, {}) == identities(value, {}) == identities(second, {})
    assert first[0] is not second[0]


@pytest.mark.parametrize("kind", ["tuple", "dict", "object", "twice"])
def test_nothing_is_held_that_the_collector_would_have_to_find(kind):
    """What a stage of a pipeline has made is counted for as long as something holds it."""
    tensor = torch.ones(3)
    inside = [tensor]
    made = {"tuple": (tensor,), "dict": {"a": inside}, "object": Slotted(tensor), "twice": [inside, inside]}
    value, alive = made.pop(kind), weakref.ref(tensor)
    del made, inside, tensor
    gc.disable()
    try:
        flat = flatten(value)
        back = unflatten(*flat)
        del value, flat, back
        assert alive() is None
    finally:
        gc.enable()
