"""Twin: a copy of a model's structure over the same weights, to be traced in its place.

``torch.export`` puts fake tensors in place of a model's weights while it traces, and a forward may set attributes. Both
happen to the twin: the model itself is the same all the while, for other threads, too. Whatever leads back to a module
of the model is copied with it: containers, bound methods, objects, and functions that have them in their closures.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from fxstream.passes.graph.parts import ATOMS, in_cell, is_plain
from fxstream.passes.graph.structure import attributes_of

CONTAINERS = (dict, OrderedDict, list, tuple, set)
OWN = {name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
"""Dictionaries of every module: its weights, its modules, its hooks."""


class Twin:
    """``module`` is the copy; ``of`` gives what stands in it for something of the model, be it a method.

    Containers of the ids ``apart`` are copied, too.
    """

    def __init__(self, model: nn.Module, apart: Collection[int] = ()) -> None:
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self._copies: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}
        self._leading = _Leading(modules, apart)
        for module in modules:
            values = {name: self._own(value) if name in OWN else self.of(value) for name, value in vars(module).items()}
            vars(self._copies[id(module)]).update(values)
        self.module: nn.Module = self.of(model)

    def of(self, value: Any) -> Any:
        """The same value, or where it leads to modules of the model another one that leads to their copies."""
        if id(value) not in self._copies and self._leading.has(value):
            self._copy(value)
        return self._copies.get(id(value), value)

    def _copy(self, value: Any) -> None:
        kind = type(value)
        if kind in (tuple, MethodType, functools.partial):
            self._copies[id(value)] = self._frozen(value)
            return
        if kind is FunctionType:
            cells = tuple(map(self._cell, value.__closure__ or ()))
            copy: Any = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
            self._copies[id(value)] = copy
            copy.__defaults__, copy.__kwdefaults__ = self.of(value.__defaults__), self.of(value.__kwdefaults__)
            copy.__module__, copy.__qualname__ = value.__module__, value.__qualname__
            vars(copy).update((name, self.of(part)) for name, part in vars(value).items())
            return
        copy = self._copies[id(value)] = kind() if kind in CONTAINERS else object.__new__(kind)
        if isinstance(value, dict):
            copy.update((name, self.of(item)) for name, item in value.items())
        elif isinstance(value, list):
            copy.extend(map(self.of, value))
        elif isinstance(value, set):
            copy.update(map(self.of, value))
        else:
            for name, part in attributes_of(value).items():
                object.__setattr__(copy, name, self.of(part))

    def _frozen(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if isinstance(value, MethodType):
            return MethodType(self.of(value.__func__), self.of(value.__self__))
        keywords = {name: self.of(part) for name, part in value.keywords.items()}
        copy = functools.partial(self.of(value.func), *map(self.of, value.args), **keywords)
        vars(copy).update((name, self.of(part)) for name, part in vars(value).items())
        return copy

    def _cell(self, cell: CellType) -> CellType:
        """A cell for the function's copy, one for all functions that share it."""
        if not self._leading.has(cell):
            return cell
        if id(cell) not in self._copies:
            copy = self._copies[id(cell)] = CellType()
            copy.cell_contents = self.of(cell.cell_contents)
        return self._copies[id(cell)]

    def _own(self, value: Any) -> Any:
        """A module's own dictionary, always another one."""
        if isinstance(value, set):
            return type(value)(value)
        return type(value)((name, self.of(item)) for name, item in value.items())


class _Leading:
    """What is apart, or leads to one of some modules, told by walks from those and from what else is asked for."""

    def __init__(self, modules: list[nn.Module], apart: Collection[int]) -> None:
        self._ends = set(map(id, modules))
        self._apart = set(apart)
        self._holders: defaultdict[int, list[int]] = defaultdict(list)
        self._met: dict[int, Any] = {}
        self._walk([part for module in modules for part in _of_module(module)])

    def has(self, value: Any) -> bool:
        if type(value) in ATOMS or id(value) in self._ends:
            return False
        if id(value) not in self._met:
            self._walk([value])
        return id(value) in self._found

    def _walk(self, waiting: list[Any]) -> None:
        while waiting:
            value = waiting.pop()
            if id(value) in self._met or id(value) in self._ends:
                continue
            self._met[id(value)] = value
            for part in _parts(value):
                if type(part) not in ATOMS:
                    self._holders[id(part)].append(id(value))
                    waiting.append(part)
        self._found = set(self._apart)
        reached = [holder for end in self._ends | self._apart for holder in self._holders[end]]
        while reached:
            holder = reached.pop()
            if holder not in self._found:
                self._found.add(holder)
                reached += self._holders[holder]


def _of_module(module: nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if name in OWN and isinstance(value, dict):
            yield from value.values()
        else:
            yield value


def _parts(value: Any) -> list[Any]:
    """What a value holds that may lead on."""
    kind = type(value)
    if kind in CONTAINERS:
        return list(value.values()) if isinstance(value, dict) else list(value)
    if kind is MethodType:
        return [value.__func__, value.__self__]
    if kind is functools.partial:
        return [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
    if kind is CellType:
        return [in_cell(value)]
    if kind is FunctionType:
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, *vars(value).values()]
    return list(attributes_of(value).values()) if _is_object(value) else []


def _is_object(value: Any) -> bool:
    """Whether a value is what its attributes are, and nothing else."""
    kind = type(value)
    bases = (torch.Tensor, nn.Module, type, *CONTAINERS, frozenset, BaseException)
    return is_plain(kind) and not isinstance(value, bases) and kind.__new__ is object.__new__
