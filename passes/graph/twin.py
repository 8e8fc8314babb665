"""Twin: a copy of a model's structure over the same weights, to be traced in its place.

``torch.export`` puts fake tensors in place of a model's weights while it traces, and a forward may set attributes. Both
happen to the twin: the model itself is the same all the while, for other threads, too.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import nn

CONTAINERS = (dict, OrderedDict, list, tuple, set)
OWN = {name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
"""Dictionaries of every module: its weights, its modules, its hooks."""


class Twin:
    """``module`` is the copy; ``of`` gives what stands in it for something of the model, be it a method."""

    def __init__(self, model: nn.Module) -> None:
        self._copies: dict[int, nn.Module] = {}
        self._entered: set[int] = set()
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        for module in modules:
            self._copies[id(module)] = object.__new__(type(module))
        for module in modules:
            values = {name: self._own(value) if name in OWN else self.of(value) for name, value in vars(module).items()}
            vars(self._copies[id(module)]).update(values)
        self.module = self.of(model)

    def of(self, value: Any) -> Any:
        """The same value, or where it holds modules of the model another one with their copies."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if type(value) is MethodType:
            return self._if_other(value.__self__, lambda copy: MethodType(value.__func__, copy), value)
        if type(value) is functools.partial:
            parts = (value.func, value.args, value.keywords)
            return self._if_other(parts, lambda copy: functools.partial(copy[0], *copy[1], **copy[2]), value)
        if type(value) not in CONTAINERS or id(value) in self._entered:
            return value
        self._entered.add(id(value))
        items = list(value.values()) if isinstance(value, dict) else list(value)
        others = [self.of(item) for item in items]
        self._entered.discard(id(value))
        if all(other is item for other, item in zip(others, items, strict=True)):
            return value
        return type(value)(zip(value, others, strict=True) if isinstance(value, dict) else others)

    def _if_other(self, held: Any, make: Any, value: Any) -> Any:
        copy = self.of(held)
        return value if copy is held else make(copy)

    def _own(self, value: Any) -> Any:
        """A module's own dictionary, always another one."""
        if isinstance(value, set):
            return type(value)(value)
        return type(value)((name, self.of(item)) for name, item in value.items())
