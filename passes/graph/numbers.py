"""Numbers: Python floats that a graph takes as values, so that a call with others needs no plan of its own.

Those in lists and dictionaries of a model (the scales of its adapters), and among the arguments of a call, are traced
as stand-ins. One that meets a tensor in arithmetic is an element of one more input of the graph. What is asked of it
beside that is noted: a comparison with a constant as a guard, whose answer is part of what a plan is made for; anything
else makes the value itself a part of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxstream.passes.graph.places import Place, value_at
from fxstream.passes.graph.snapshot import Snapshot

Guard = tuple[str, float]
"""A comparison, by its name in ``operator``, and the constant that a number is compared with."""

LEAF = "leaf"
"""The root of places of a call's arguments, which go by their positions among its leaves."""

WITH_TENSORS = {
    *("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"),
    *("div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__"),
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__"),
}
"""Arithmetic of a tensor and a number that is the same with a tensor of no dimensions, to the last bit."""

ASKING = """
    abs ceil divmod float floor floordiv format hash int mod neg pos pow
    rdivmod repr rfloordiv rmod round rpow str trunc
"""
"""What Python asks a float for its value by."""


@dataclass
class Numbers:
    """The numbers of one trace, by their ``places``, and what the trace does with them."""

    places: Sequence[Place]
    values: Sequence[float]
    guards: dict[Place, set[Guard]] = field(default_factory=dict)
    told: set[Place] = field(default_factory=set)

    def vector(self) -> Tensor:
        """The values, as the graph takes them."""
        return torch.tensor(self.values, dtype=torch.float64)

    def stand_ins(self, vector: Tensor) -> dict[Place, Number]:
        """One for each place, whose value in the graph is an element of ``vector``."""
        return {
            place: Number(value, self, frozenset([place]), partial(torch.select, vector, 0, index), place)
            for index, (place, value) in enumerate(zip(self.places, self.values, strict=True))
        }

    def taken(self) -> dict[Place, frozenset[Guard]]:
        """The places whose values have no part in what a plan is made for, with the guards that have."""
        return {place: frozenset(self.guards.get(place, ())) for place in self.places if place not in self.told}


class Number:
    """Stands for a float: to ``isinstance`` it is one, to torch's functions something that answers for itself."""

    __slots__ = ("_numbers", "_place", "_sources", "_tensor", "_value")

    def __init__(
        self,
        value: float,
        numbers: Numbers,
        sources: frozenset[Place],
        tensor: Callable[[], Tensor],
        place: Place | None = None,
    ) -> None:
        self._value, self._numbers, self._sources, self._tensor, self._place = value, numbers, sources, tensor, place

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return float

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and len(args) == 2 and getattr(function, "__name__", "") in WITH_TENSORS:
            one, other = args
            if type(one) is Number and isinstance(other, Tensor) and _is_traced(other):
                return function(one.in_graph(), other)
            if isinstance(one, Tensor) and type(other) is Number and _is_traced(one):
                return function(one, other.in_graph())
        args, kwargs = pytree.tree_map(told, (args, kwargs or {}))
        return function(*args, **kwargs)

    def in_graph(self) -> Tensor:
        """The tensor of no dimensions that has the value in the graph."""
        return self._tensor()

    def tell(self) -> float:
        """The value, which is then part of what the plan is made for."""
        self._numbers.told |= self._sources
        return self._value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tell(), name)

    def __bool__(self) -> bool:
        return self != 0


def _is_traced(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.is_floating_point() and tensor.dim() > 0


def told(value: Any) -> Any:
    """What a stand-in stands for; any other value as it is."""
    return value.tell() if type(value) is Number else value


def _arithmetic(name: str, swapped: bool = False) -> Callable[[Number, Any], Any]:
    function = getattr(operator, name)

    def method(self: Number, other: Any) -> Any:
        if type(other) is Number:
            sources, value, tensor = self._sources | other._sources, other._value, other._tensor
        elif type(other) in (int, float):
            sources, value, tensor = self._sources, other, lambda: other
        else:
            return NotImplemented
        if swapped:
            return Number(
                function(value, self._value), self._numbers, sources, lambda: function(tensor(), self._tensor())
            )
        return Number(function(self._value, value), self._numbers, sources, lambda: function(self._tensor(), tensor()))

    return method


def _comparison(name: str) -> Callable[[Number, Any], Any]:
    function = getattr(operator, name)

    def method(self: Number, other: Any) -> Any:
        if self._place is not None and type(other) in (int, float):
            self._numbers.guards.setdefault(self._place, set()).add((name, float(other)))
            return function(self._value, other)
        return function(self.tell(), told(other))

    return method


def _asked(name: str) -> Callable[..., Any]:
    def method(self: Number, *args: Any) -> Any:
        return getattr(float, name)(self.tell(), *map(told, args))

    return method


for _name in ("add", "sub", "mul", "truediv"):
    setattr(Number, f"__{_name}__", _arithmetic(_name))
    setattr(Number, f"__r{_name}__", _arithmetic(_name, swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Number, f"__{_name}__", _comparison(_name))
for _name in ASKING.split():
    setattr(Number, f"__{_name}__", _asked(f"__{_name}__"))


def number_places(snapshot: Snapshot) -> list[Place]:
    """Where lists and dictionaries that a model holds have floats.

    ``snapshot`` goes into the code. What that knows by another way than the model's attributes is left out.
    """
    held = {
        key: node for key, node in snapshot.nodes.items() if type(node.value) in (dict, list) and _is_held(node.place)
    }
    for node in snapshot.nodes.values():
        for step, part in node.parts.items():
            if id(part) in held and not _is_held((*node.place, step)):
                del held[id(part)]
    steps = ((node, step) for node in held.values() for step, part in node.parts.items() if type(part) is float)
    return [(*node.place, step) for node, step in steps]


def _is_held(place: Place) -> bool:
    return place[0] == ("root", "model") and all(kind in ("attribute", "item") for kind, _ in place[1:])


def leaf_place(position: int) -> Place:
    """The place of one of a call's leaves."""
    return ("root", LEAF), ("item", position)


def is_leaf(place: Place) -> bool:
    return place[0][1] == LEAF


def answers(value: float, guards: frozenset[Guard]) -> tuple[bool, ...]:
    """What a number answers to its guards."""
    return tuple(getattr(operator, name)(value, constant) for name, constant in sorted(guards))


@dataclass(frozen=True)
class Taken:
    """What the graphs of a kind of call have shown of numbers: which are values, with their guards, and which are not.

    ``hidden`` is equal where what is taken is.
    """

    guards: Mapping[Place, frozenset[Guard]] = field(default_factory=dict)
    told: frozenset[Place] = frozenset()
    hidden: frozenset[Any] = frozenset()

    def joined(self, guards: Mapping[Place, frozenset[Guard]], told: Iterable[Place]) -> Taken:
        """With what one more graph has shown."""
        never = self.told.union(told)
        places = {*self.guards, *guards} - never
        both = {place: self.guards.get(place, frozenset()) | guards.get(place, frozenset()) for place in places}
        return Taken(both, never, frozenset(both.items()))


NOTHING_TAKEN = Taken()


def owners_of(places: Sequence[Place], roots: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The list or dictionary of each place, and where in it; None of a leaf."""
    return [(None if is_leaf(place) else value_at(place[:-1], roots), place[-1][1]) for place in places]
