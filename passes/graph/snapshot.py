"""Snapshots: what a model is besides the values of its weights, and what a call of it changes.

A snapshot walks all that is reached from some roots: modules, containers, plain objects, functions and their closures.
The look at every call (``holds``), the key by which plans are told apart (``key``), what a forward changed
(``changes``) and the way back from that (``rewind``) are of one walk, so that what the one sees, the others see.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.guards import TensorGuards, dict_version
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.passes.graph.parts import (
    ABSENT,
    ATOMS,
    BOOKKEEPING,
    BYTES,
    CACHED,
    HOOKS,
    MISSES,
    POSITION,
    Step,
    attributes_of,
    bare,
    in_cell,
    is_array,
    is_ours,
    is_plain,
    names_in,
    parts_of,
    restore,
    set_part,
)
from fxstream.passes.graph.places import Place, value_at
from fxstream.passes.graph.structure import flatten, slots
from fxstream.passes.graph.subclasses import plain_tensors
from fxstream.runtime.autocast import autocast_devices

_GLOBAL_HOOKS = (
    *("_global_forward_pre_hooks", "_global_forward_hooks"),
    *("_global_forward_hooks_with_kwargs", "_global_forward_hooks_always_called"),
)


@dataclass(frozen=True, slots=True)
class _Node:
    """A value with parts, where it was found first, and the parts that it had."""

    value: Any
    place: Place
    parts: dict[Step, Any]


@dataclass(frozen=True)
class Change:
    """One place where a value is another than before. ``more`` is set where a list has grown: ``after`` is the new."""

    place: Place
    before: Any
    after: Any
    more: bool = False


class Snapshot:
    """What is reached from some roots, as it was when this was made. It keeps all of that alive.

    With ``code`` the walk goes on into what the code of methods and functions names: globals, and what their closures
    hold. That takes too long for a look at every call. What
    is in the tensors at the places ``asked`` is part of what is seen.
    """

    def __init__(self, roots: Mapping[Any, Any], code: bool = False, asked: Collection[Place] = ()) -> None:
        self.roots = dict(roots)
        self.code = code
        self.nodes: dict[int, _Node] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        with torch._C.DisableTorchFunction():
            self._walk()
            self.weights = _weights(self.roots.get("model"))
            values = (value_at(place, self.roots) for place in asked)
            self._asked = {id(value): value for value in values if isinstance(value, torch.Tensor)}
            if not code:
                self._watch()

    def _walk(self) -> None:
        waiting: list[tuple[Place, Any]] = [((("root", name),), value) for name, value in reversed(self.roots.items())]
        named, unnamed = {"forward", "__call__"}, defaultdict[str, list[tuple[Place, Any]]](list)
        while waiting:
            place, value = waiting.pop()
            if isinstance(value, torch.Tensor):
                self.tensors[id(value)] = value
                if not is_plain(type(value)):
                    continue
            if place[-1][0] == "method":
                if not (self.code and is_ours(getattr(bare(value), "__module__", None))):
                    continue
                if place[-1][1] not in named:  # no code that was reached calls anything by this name
                    unnamed[place[-1][1]].append((place, value))
                    continue
            if id(value) in self.nodes or (parts := parts_of(value, self.code)) is None:
                continue
            self.nodes[id(value)] = _Node(value, place, parts)
            found = [((*place, step), part) for step, part in parts.items() if type(part) not in ATOMS]
            waiting.extend(reversed(found))
            if self.code and isinstance(value, types.FunctionType):
                for name in {*names_in(value.__code__)} - named:
                    named.add(name)
                    waiting.extend(unnamed.pop(name, ()))

    def _watch(self) -> None:
        """Prepare flat lists of what ``holds`` compares, whose elements are nearly always the same objects."""
        values = [node.value for node in self.nodes.values()]
        modules = [value for value in values if isinstance(value, nn.Module)]
        self._modules = [(_getter(module), vars(module)) for module in modules]
        plain = [value for value in values if not isinstance(value, (nn.Module, type))]
        objects = [value for value in plain if is_plain(type(value))]
        containers = [*filter(_is_container, plain), *map(attributes_of, objects)]
        self._empty = [value for value in containers if not len(value)]
        self._dicts = [value for value in containers if len(value) and isinstance(value, dict)]
        self._sequences = [value for value in containers if len(value) and not isinstance(value, dict)]
        self._classes = [vars(value) for value in values if isinstance(value, type)]
        self._functions = [value for value in plain if isinstance(value, types.FunctionType)]
        self._slotted = [value for value in objects if slots(type(value))]
        self._arrays = [value for value in values if is_array(value)]
        self._typed = [*modules, *objects]
        self._attributes = [*self._dicts, *map(vars, modules)]
        self._ordered = [value for value in self._dicts if isinstance(value, OrderedDict)]
        self._constants = [tensor for key, tensor in self.tensors.items() if key not in self.weights]
        self._layouts = _Layouts([*self.weights.values(), *self._constants])
        self._equal, self._same = self._values(), self._objects()
        self._versions = self._versions_now()
        self._sizes, self._named = self._sizes_now(), self._named_objects()

    def _values(self) -> list[Any]:
        """What is compared by value."""
        return [
            *map(len, self._sequences),
            *map(len, self._classes),
            *map(_pointer, self._constants),
            *map(bytes, self._arrays),
            *map(_bytes, self._asked.values()),
        ]

    def _objects(self) -> list[Any]:
        """What has to be the same objects, but for what is in dictionaries."""
        return [
            *map(type, self._typed),
            *chain.from_iterable(self._sequences),
            *chain.from_iterable(self._ordered),  # whose order has no part in their versions
            *chain.from_iterable([attributes.values() for attributes in self._classes]),
            *chain.from_iterable(map(_function_values, self._functions)),
            *chain.from_iterable(map(_slot_values, self._slotted)),
        ]

    def _dictionaries_hold(self) -> bool:
        """Whether all that a forward may read in dictionaries is the same; looked at where a dictionary is not."""
        versions = self._versions_now()
        if versions != self._versions:
            if self._sizes_now() != self._sizes or not all(map(is_, self._named_objects(), self._named)):
                return False
            self._versions = versions
        return True

    def _versions_now(self) -> list[int]:
        """Numbers that change with every change of a dictionary."""
        return [*map(dict_version, self._attributes)]

    def _sizes_now(self) -> list[int]:
        return [*map(len, self._attributes)]

    def _named_objects(self) -> list[Any]:
        """What has to be the same objects in dictionaries: the attributes of modules among them."""
        return [
            *chain.from_iterable([get(attributes) for get, attributes in self._modules]),
            *chain.from_iterable(self._dicts),
            *chain.from_iterable(map(dict.values, self._dicts)),
        ]

    def constants(self) -> dict[torch.Tensor, list[Place]]:
        """The places of each tensor that is no weight of the model, and no argument of the call."""
        found: dict[torch.Tensor, list[Place]] = {}
        given = {id(tensor) for name in ("args", "kwargs") for tensor in flatten(self.roots.get(name)).tensors}
        for node in self.nodes.values():
            for step, part in node.parts.items():
                if isinstance(part, torch.Tensor) and id(part) not in self.weights and id(part) not in given:
                    found.setdefault(part, []).append((*node.place, step))
        return found

    def has(self, place: Place) -> bool:
        """Whether what is at a place is seen at every look, which goes no further than the model's own values."""
        parent = value_at(place[:-1], self.roots)
        return place[-1][0] not in ("global", "module") and id(parent) in self.nodes

    def holds(self) -> bool:
        """Whether all is as it was. May say no where it is: a number may have been set to its own value."""
        try:
            return (
                not any(self._empty)
                and self._values() == self._equal
                and all(map(is_, self._objects(), self._same))
                and self._dictionaries_hold()
                and self._layouts.hold()
            )
        except (KeyError, RuntimeError, ValueError):  # a name is gone, or a container changed under the look
            return False

    def key(self, hidden: Collection[Place] = (), live: Collection[Place] = ()) -> Any:
        """A value that is equal for states that one plan serves.

        What is ``hidden`` has no part in it. A tensor at a ``live`` place, or in what is there, goes by its layout;
        so do weights. Any other is itself alone.
        """
        return _Key(self, hidden, live).of({(("root", name),): value for name, value in self.roots.items()})

    def changes(self, now: Snapshot) -> list[Change]:
        """What differs in ``now``, a later snapshot of the same roots, from this one; new containers are compared."""
        found: dict[Place, Change] = {}
        globals_: set[tuple[int, str]] = set()
        for key, node in self.nodes.items():
            later = now.nodes.get(key)
            if (
                later is None
                or isinstance(node.value, CACHED)
                or any(node.place[:length] in found for length in range(1, len(node.place) + 1))
            ):
                continue
            for change in self._changes_of(node, later, now):
                step, name = change.place[-1]
                if step == "global":
                    known = id(node.value.__globals__), name
                    if known in globals_:
                        continue
                    globals_.add(known)
                found[change.place] = change
        return list(found.values())

    def _changes_of(self, node: _Node, later: _Node, now: Snapshot) -> Iterator[Change]:
        if isinstance(node.value, (list, deque)):
            before, after = (
                [part for (kind, _), part in each.parts.items() if kind == "item"] for each in (node, later)
            )
            if len(before) != len(after):
                same = len(after) > len(before) and all(map(is_, before, after)) and not _is_bounded(node.value)
                content = after[len(before) :] if same else after
                yield Change((*node.place, ("content", None)), before, content, more=same)
                return
        for step in {**node.parts, **later.parts}:
            before, after = node.parts.get(step, ABSENT), later.parts.get(step, ABSENT)
            if before is not after and (self.content(before) != now.content(after)):
                yield Change((*node.place, step), before, after)

    def content(self, value: Any) -> Any:
        """The key of one value of those reached."""
        return _Key(self, weights=False).of({(): value})

    def rewind(self) -> None:
        """Give all that was reached the parts that it had. What is as it was is left alone."""
        for node in self.nodes.values():
            now = parts_of(node.value, self.code)
            if isinstance(node.value, CACHED):
                if now is not None and node.parts[MISSES] != now[MISSES]:
                    node.value.cache_clear()  # what was kept there is of the capture
            elif POSITION in node.parts:
                continue
            elif is_array(node.value):
                if now != node.parts:
                    set_part(node.value, BYTES, node.parts[BYTES])
            elif now is not None and not (
                now.keys() == node.parts.keys() and all(map(is_, now.values(), node.parts.values()))
            ):
                restore(node.value, node.parts, now)


class _Layouts:
    """How some tensors are laid out, each the same object all the while.

    Torch's guards of tensors tell it fast, but only in the mode that they are made in, such as inference mode.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self.offsets, self.layouts = self._offsets(), self._all()
        self.guards: Any = None

    def hold(self) -> bool:
        """Whether they are laid out as they were."""
        if self._offsets() != self.offsets:
            return False
        if self.guards is None or not self.guards.check(*self.tensors):
            guards = TensorGuards(*self.tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            if self._all() != self.layouts:
                return False
            self.guards = guards
        return True

    def _offsets(self) -> list[Any]:
        return [*map(torch.Tensor.storage_offset, self.tensors)]

    def _all(self) -> list[Any]:
        return [*map(_LAYOUT, self.tensors), *map(torch.Tensor.stride, self.tensors)]


class _Key:
    """Builds the key of values in a snapshot: the parts of each node reached, by its number in the order of arrival."""

    def __init__(
        self, snapshot: Snapshot, hidden: Collection[Place] = (), live: Collection[Place] = (), weights: bool = True
    ) -> None:
        self.snapshot = snapshot
        self.weights = snapshot.weights if weights else {}
        self.hidden, self.live = frozenset(hidden), frozenset(live)
        self.numbers: dict[Any, int] = {}
        self.waiting: deque[_Node] = deque()

    def of(self, values: Mapping[Place, Any]) -> Any:
        with torch._C.DisableTorchFunction():
            found = [tuple(self._part(value, place) for place, value in values.items() if place not in self.hidden)]
            while self.waiting:
                node = self.waiting.popleft()
                parts = [
                    (self._name(node, step), self._part(part, (*node.place, step)))
                    for step, part in node.parts.items()
                    if not self.hidden or (*node.place, step) not in self.hidden
                ]
                if self.hidden and (*node.place, ("content", None)) in self.hidden:
                    parts = []
                kind = _Same(node.value) if isinstance(node.value, type) else type(node.value)
                found.append((kind, frozenset(parts) if isinstance(node.value, (set, frozenset)) else tuple(parts)))
        return tuple(found)

    def _name(self, node: _Node, step: Step) -> Any:
        if step[0] == "item" and str(node.place[-1][1]).endswith(_HANDLED):
            return self._number(("handle", step[1]))  # handles of hooks only ever grow
        return step[0], type(step[1]), step[1]

    def _number(self, of: Any) -> int:
        return self.numbers.setdefault(of, len(self.numbers))

    def _part(self, value: Any, place: Place) -> Any:
        node = self.snapshot.nodes.get(id(value))
        if node is not None and id(value) not in self.numbers:
            self.waiting.append(node)
        if isinstance(value, torch.Tensor):
            layout = _LAYOUT(value), torch.Tensor.stride(value), torch.Tensor.storage_offset(value)
            if id(value) in self.weights or self._is_live(place):
                return "tensor", self._number(id(value)), layout
            held = _bytes(value) if id(value) in self.snapshot._asked else None
            return _Same(value), self._number(id(value)), layout, _pointer(value), held
        return _atom(value) if node is None else self._number(id(value))

    def _is_live(self, place: Place) -> bool:
        return bool(self.live) and any(place[:length] in self.live for length in range(1, len(place) + 1))


_HANDLED = (*HOOKS, *_GLOBAL_HOOKS)


_LAYOUT = attrgetter("shape", "dtype", "device", "requires_grad")


def key_of(value: Any) -> Any:
    """What is equal for values that are alike down to their parts, of an argument that is no tensor.

    Raises ``TypeError`` for one that can be changed and does not tell what is in it.
    """
    if type(value) in ATOMS:
        return _atom(value)
    if parts_of(value, False) is None and type(value).__hash__ is None:
        raise TypeError(type(value).__name__)
    return Snapshot({"value": value}).key()


def roots_of(module: nn.Module) -> dict[str, Any]:
    """A model, and the hooks of all modules, as the roots of a snapshot."""
    return {"model": module, **global_hooks()}


def global_hooks() -> dict[str, dict[int, Any]]:
    """The hooks of all modules, by torch's names for them."""
    everywhere = vars(torch.nn.modules.module)
    return {name: everywhere[name] for name in _GLOBAL_HOOKS if name in everywhere}


def environment() -> Any:
    """What of torch's own state a graph or its plan depends on."""
    casts = tuple((device, torch.get_autocast_dtype(device)) for device in autocast_devices())
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.get_default_dtype(), torch.get_default_device(), casts, torch.get_num_threads(), deterministic


def _weights(model: Any) -> dict[int, torch.Tensor]:
    """The weights of a model, which its graphs reach into it for."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    tables = (chain(module._parameters.values(), module._buffers.values()) for module in modules)
    weights = (weight for weight in chain.from_iterable(tables) if weight is not None)
    inner = (plain for weight in weights for _, plain in ((None, weight), *plain_tensors(weight)))
    return {id(weight): weight for weight in inner}


def _pointer(tensor: torch.Tensor) -> int:
    """Where a tensor's memory is; 0 where it has none."""
    if isinstance(tensor, FakeTensor) or type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta:
        return 0
    return tensor.data_ptr()


def _getter(module: nn.Module) -> Callable[[Any], tuple[Any, ...]]:
    """Takes from a module's attributes what a forward may read and what is no container of torch's."""
    return itemgetter(*(name for name in vars(module) if name not in BOOKKEEPING))


def _is_bounded(value: Any) -> bool:
    return isinstance(value, deque) and value.maxlen is not None


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, deque, set))


def _function_values(value: types.FunctionType) -> Iterator[Any]:
    yield value.__code__
    yield from map(in_cell, value.__closure__ or ())
    yield from value.__defaults__ or ()
    yield from (value.__kwdefaults__ or {}).values()


def _slot_values(value: Any) -> Iterator[Any]:
    return (getattr(value, name, ABSENT) for name in slots(type(value)))


def _bytes(tensor: torch.Tensor) -> bytes:
    """What a tensor holds."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _atom(value: Any) -> Any:
    """The key of a value without parts: with its type, as 2, 2.0 and True differ, and so do zeros of either sign."""
    if isinstance(value, float):
        return type(value), float(value).hex()
    if isinstance(value, complex):
        return type(value), value.real.hex(), value.imag.hex()
    if isinstance(value, (int, str, bytes, range)) or (type(value) in ATOMS and type(value) is not slice):
        return type(value), value
    if isinstance(value, slice):
        return slice, *map(_atom, (value.start, value.stop, value.step))
    if isinstance(value, weakref.ref):
        return type(value), value() is None  # torch's RNNs hold such to their weights, which a capture exchanges
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
        return type(value), value.tobytes()
    return _Same(value)


class _Same:
    """Equal to another of the same object alone, which it keeps alive, so that no later one takes its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
