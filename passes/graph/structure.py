"""Structures: any nest of containers and objects as its tensors, its other leaves, and how they are put together."""

from __future__ import annotations

import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree


class _TensorLeaf:
    def __repr__(self) -> str:
        return "<tensor>"


TENSOR = _TensorLeaf()
"""Stands for a tensor among the other leaves."""


@dataclass(frozen=True)
class Made:
    """A leaf that is made anew each time that a value is put together."""

    value: Any

    def copy(self, copied: dict[int, Any]) -> Any:
        """One of its own, where it can be copied; what was ``copied`` with it already is in it again."""
        try:
            return deepcopy(self.value, copied)
        except Exception:  # what its class makes of being copied
            return self.value


class Flattened(NamedTuple):
    """The tensors of a value, its other leaves with ``TENSOR`` for each tensor, and its structure."""

    tensors: tuple[torch.Tensor, ...]
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec


def flatten(value: Any) -> Flattened:
    """Any nest of containers and objects, taken apart. What is in it twice is known to be one."""
    met: list[Any] = []

    def meet(part: Any) -> bool:
        met.append(part)
        return _is_size(part)

    leaves, spec = pytree.tree_flatten(value, is_leaf=meet)
    repeats = _repeat(met)
    met.clear()  # pytree leaves ``meet`` to the collector
    if repeats or any(map(_holds_tensors, leaves)):
        parted = _parted(value, _repeated(value, {}), {})
        leaves, spec = pytree.tree_flatten(parted, is_leaf=_is_size)
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return Flattened(tensors, tuple(TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), spec)


def unflatten(tensors: Sequence[torch.Tensor], rest: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The inverse of ``flatten``."""
    given, copied = iter(tensors), dict[int, Any]()
    leaves = (leaf.copy(copied) if isinstance(leaf, Made) else leaf for leaf in rest)
    _TIED.made = {}
    try:
        return pytree.tree_unflatten([next(given) if leaf is TENSOR else leaf for leaf in leaves], spec)
    finally:
        _TIED.made = {}


def _is_size(value: Any) -> bool:
    """Whether this is a shape, which pytree would make a tuple of."""
    return type(value) is torch.Size


@dataclass(frozen=True)
class _Opened:
    """What is in a value of a class that pytree doesn't know: its elements, if it is a container, and its attributes.

    ``settings`` are those of its container that are neither.
    """

    kind: type
    elements: Any
    attributes: dict[str, Any]
    settings: tuple[Any, ...]


_HEAP = 1 << 9  # of the flags of a type that is made in Python
_LEAVES = (torch.Tensor, nn.Module, type, str, bytes, int, float, complex, type(None), _TensorLeaf, Iterator)
_BASES = (OrderedDict, defaultdict, dict, types.MappingProxyType, list, tuple, deque, set, frozenset)


def _holds_tensors(leaf: Any, around: tuple[int, ...] = ()) -> bool:
    """Whether a leaf of pytree's is an object, or a container unknown to it, with tensors in it."""
    if isinstance(leaf, _LEAVES) or id(leaf) in around:
        return False
    found = pytree.tree_leaves([_elements(leaf), attributes_of(leaf)])
    return any(isinstance(x, torch.Tensor) or _holds_tensors(x, (*around, id(leaf))) for x in found)


def _base(kind: type) -> type | None:
    return next((base for base in _BASES if issubclass(kind, base)), None)


def _elements(leaf: Any) -> Any:
    """What is in a container, whatever its class makes of iteration; None of what is none."""
    base = _base(type(leaf))
    if base is None:
        return None
    if issubclass(base, dict):
        items = OrderedDict.items if base is OrderedDict else dict.items
        return dict(items(leaf))
    iterate: Any = vars(base).get("__iter__")
    return dict(leaf) if base is types.MappingProxyType else list(iterate(leaf))


def attributes_of(leaf: Any) -> dict[str, Any]:
    """The attributes of an object: of its dictionary, and those in slots."""
    try:
        found = dict(object.__getattribute__(leaf, "__dict__"))
    except AttributeError:
        found = {}
    return found | {name: getattr(leaf, name) for name in slots(type(leaf)) if hasattr(leaf, name)}


def slots(kind: type) -> list[str]:
    """The names of the slots of a class and its bases."""
    names: list[str] = []
    for base in kind.__mro__:
        own = vars(base).get("__slots__", ())
        names += (own,) if isinstance(own, str) else own
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _is_known(value: Any) -> bool:
    """Whether pytree takes this apart."""
    return not pytree.tree_is_leaf(value, is_leaf=_is_size)


def _is_one(value: Any) -> bool:
    """Whether it shows where a container or an object is in two places: it can be changed."""
    return not isinstance(value, (*_LEAVES, tuple, frozenset))


def _repeat(values: Iterable[Any]) -> bool:
    ids = [id(value) for value in values if _is_one(value)]
    return len(set(ids)) < len(ids)


def _all_but(identity: int) -> Callable[[Any], bool]:
    """Whether a value is another than the one of that id. It is not held: pytree leaves this to the collector."""
    return lambda value: id(value) != identity


def _inside(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """What is in a container, or an object with tensors, and how to put others there; None of a leaf."""
    if _is_known(value):
        parts, spec = pytree.tree_flatten(value, is_leaf=_all_but(id(value)))
        return parts, lambda others: pytree.tree_unflatten(others, spec)
    if not _holds_tensors(value):
        return None
    settings = getattr(value, "default_factory", None), getattr(value, "maxlen", None)
    elements, attributes = _elements(value), attributes_of(value)
    parts, spec = pytree.tree_flatten(elements, is_leaf=_all_but(id(elements)))
    return [*parts, *attributes.values()], lambda others: _Opened(
        type(value),
        pytree.tree_unflatten(others[: len(parts)], spec),
        dict(zip(attributes, others[len(parts) :], strict=True)),
        settings,
    )


def _repeated(value: Any, met: dict[int, int]) -> set[int]:
    """What is in a value twice, by ids; ``met`` counts."""
    inside = _inside(value)
    if inside is not None:
        met[id(value)] = met.get(id(value), 0) + _is_one(value)
        if met[id(value)] < 2:
            for part in inside[0]:
                _repeated(part, met)
    return {key for key, times in met.items() if times > 1}


def _parted(value: Any, repeated: Collection[int], numbers: dict[int, int]) -> Any:
    """A value as containers that pytree knows; where one comes again, it is named by its number."""
    inside = _inside(value)
    if inside is None:
        return value
    if id(value) in numbers:
        return _Again(numbers[id(value)])
    number = len(numbers)
    if id(value) in repeated:
        numbers[id(value)] = number
    parts, put = inside
    others = [_parted(part, repeated, numbers) for part in parts]
    made = value if _is_known(value) and all(map(is_, others, parts)) else put(others)
    return _First(made, number) if id(value) in repeated else made


@dataclass(frozen=True)
class _First:
    """What comes again."""

    value: Any
    number: int


@dataclass(frozen=True)
class _Again:
    """What came before."""

    number: int


_TIED = threading.local()


def _tied(values: Iterable[Any], number: int) -> Any:
    [_TIED.made[number]] = values
    return _TIED.made[number]


pytree.register_pytree_node(_First, lambda first: ([first.value], first.number), _tied)
pytree.register_pytree_node(_Again, lambda again: ([], again.number), lambda values, number: _TIED.made[number])


def _taken(opened: _Opened) -> tuple[list[Any], Any]:
    names = tuple(opened.attributes)
    return [opened.elements, *opened.attributes.values()], (opened.kind, names, opened.settings)


def _closed(values: Iterable[Any], context: tuple[type, tuple[str, ...], tuple[Any, ...]]) -> Any:
    kind, names, (factory, length) = context
    elements, *attributes = values
    base: Any = _base(kind)
    if base is None:
        new: Any = (object if kind.__flags__ & _HEAP else kind).__new__
        made = new(kind)
    elif base is types.MappingProxyType:
        made = base(elements)
    elif base in (tuple, frozenset):
        made = base.__new__(kind, elements)
    else:
        made = base.__new__(kind)
        first = {defaultdict: (factory, elements), deque: (elements, length)}.get(base, (elements,))
        base.__init__(made, *first)
    for name, value in zip(names, attributes, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(_Opened, _taken, _closed)
