"""Structures: any nest of containers and objects as its tensors, its other leaves, and how they are put together."""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
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

    def copy(self) -> Any:
        """One of its own, where it can be copied."""
        try:
            return deepcopy(self.value)
        except Exception:  # what its class makes of being copied
            return self.value


class Flattened(NamedTuple):
    """The tensors of a value, its other leaves with ``TENSOR`` for each tensor, and its structure."""

    tensors: tuple[torch.Tensor, ...]
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec


def flatten(value: Any) -> Flattened:
    """Any nest of containers and objects, taken apart."""
    leaves, spec = pytree.tree_flatten(value, is_leaf=_is_size)
    if any(_holds_tensors(leaf) for leaf in leaves):
        leaves, spec = pytree.tree_flatten(
            pytree.tree_unflatten([_opened(leaf) for leaf in leaves], spec), is_leaf=_is_size
        )
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return Flattened(tensors, tuple(TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), spec)


def unflatten(tensors: Sequence[torch.Tensor], rest: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The inverse of ``flatten``."""
    given = iter(tensors)
    leaves = (leaf.copy() if isinstance(leaf, Made) else leaf for leaf in rest)
    return pytree.tree_unflatten([next(given) if leaf is TENSOR else leaf for leaf in leaves], spec)


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


def _opened(leaf: Any) -> Any:
    if not _holds_tensors(leaf):
        return leaf
    settings = getattr(leaf, "default_factory", None), getattr(leaf, "maxlen", None)
    elements, attributes = pytree.tree_map(_opened, (_elements(leaf), attributes_of(leaf)))
    return _Opened(type(leaf), elements, attributes, settings)


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
