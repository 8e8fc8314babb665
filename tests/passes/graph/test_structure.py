import collections
import types
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
