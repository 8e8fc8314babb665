"""Submodules: a call that is no single graph runs as the model's own code, and its submodules that are one streamed.

A branch on data can't be in a graph. The module that has it runs as it is, in order, and what it calls is streamed:
each submodule by plans of its own, or, where that has such a branch in turn, by its own submodules.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fxstream.budget import Budget, Resident, format_bytes
from fxstream.errors import CaptureError
from fxstream.live import Live
from fxstream.passes.graph.capture import owner
from fxstream.passes.graph.liveness import storages_of
from fxstream.passes.graph.subclasses import weights_of
from fxstream.passes.graph.turns import turn

if TYPE_CHECKING:
    from fxstream.planned import Compiled
    from fxstream.report import Plan

Residents = Callable[[Sequence[torch.Tensor]], Resident]
Stream = Callable[[nn.Module, Residents | None], Any]
"""Makes a streamed module of a submodule, given what tells what is held beside it where a budget is in bytes."""

_ROUTES: ContextVar[Mapping[int, Callable[..., Any]]] = ContextVar("_ROUTES", default=MappingProxyType({}))


class Submodules:
    """What becomes of the calls of ``model`` that are no single graph. ``stream`` makes what its submodules run by."""

    def __init__(self, model: Callable[..., Any], budget: Budget, resident: Residents | None, stream: Stream) -> None:
        self._module, self._function = owner(model)
        self._budget, self._resident, self._stream = budget, resident, stream
        self._streamed: dict[str, tuple[nn.Module, Any]] = {}
        self._here = threading.local()
        self.calls: set[Any] = set()

    @property
    def compiled(self) -> Iterator[Compiled]:
        """What was planned of the submodules."""
        for _, streamed in self._streamed.values():
            yield from streamed._compiled.values()
            yield from streamed._submodules.compiled if streamed._submodules is not None else ()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of the submodules."""
        return tuple(plan for _, streamed in self._streamed.values() for plan in streamed.plans)

    def take(self, call: Any, error: CaptureError) -> None:
        """Let calls of this kind, which are refused with ``error``, run so; says so once."""
        if not self.calls:
            name = type(self._module).__name__
            names = [path for path, _ in _units(self._module)]
            parts = (
                f"{len(names)} submodules of it are streamed ({names[0]} ...)" if names else "none of it is streamed"
            )
            warnings.warn(
                f"{name} is no single graph, so its own code runs and {parts}. fullgraph=True makes this an error. "
                f"{error}",
                stacklevel=2,
            )
        self.calls.add(call)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model, its submodules streamed."""
        live = self._here.live = _Live() if self._budget.total_bytes is not None else None
        resident = None
        if live is not None:
            live.add((args, kwargs))  # which whoever calls holds
            resident = self._beside
        for path, module in _units(self._module):
            if path not in self._streamed or self._streamed[path][0] is not module:
                self._streamed[path] = module, self._stream(module, resident)
        routes = {id(module): self._route(streamed) for module, streamed in self._streamed.values()}
        with _routed(self._module, routes), live or nullcontext():
            result = self._function(*args, **kwargs)
        if live is not None:
            self._check(live)
        return result

    def _route(self, streamed: Any) -> Callable[..., Any]:
        live = self._here.live
        if live is None:
            return streamed

        def route(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                result = streamed(*args, **kwargs)
            live.add(result)
            return result

        return route

    def _beside(self, tensors: Sequence[torch.Tensor]) -> Resident:
        """What is held while a submodule runs: the weights of the whole, and what the model's own code has made."""
        held = self._around(tensors)
        mine = {key for tensor in tensors for key, _ in storages_of(tensor)}
        return replace(held, other_bytes=held.other_bytes + self._here.live.bytes(apart=mine))

    def _around(self, tensors: Sequence[torch.Tensor]) -> Resident:
        if self._resident is not None:
            return self._resident(tensors)
        name = type(self._module).__name__
        return Resident(name, {name: sum(weight.untyped_storage().nbytes() for weight in weights_of(self._module))})

    def _check(self, live: _Live) -> None:
        """Say where what runs as it is holds more than the budget."""
        most, allowed = live.most + self._around(()).bytes, self._budget.total_bytes or 0
        if most > allowed:
            warnings.warn(
                f"what of {type(self._module).__name__} runs as it is held {format_bytes(most)} with the weights, more "
                f"than the budget of {format_bytes(allowed)}",
                stacklevel=2,
            )


def _units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The submodules that a module may call and that are made of others, by their paths; their own are left out."""
    for name, child in module.named_children():
        here = f"{path}{name}"
        if type(child).forward is nn.Module.forward:  # a list of modules, which is never called
            yield from _units(child, f"{here}.")
        elif any(True for _ in child.children()):
            yield here, child


_CALL, _RUNNING = nn.Module.__call__, [0]


def _routed_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    route = _ROUTES.get().get(id(self))
    return _CALL(self, *args, **kwargs) if route is None else route(*args, **kwargs)


@contextmanager
def _routed(module: nn.Module, routes: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """While ``module`` runs in this thread, let calls of these submodules take their routes."""
    others = {**_ROUTES.get(), **routes}
    others.pop(id(module), None)
    token = _ROUTES.set(others)
    with turn():  # no trace may exchange the same meanwhile
        _RUNNING[0] += 1
        nn.Module.__call__ = _routed_call  # type: ignore[method-assign]
    try:
        yield
    finally:
        with turn():
            _RUNNING[0] -= 1
            if not _RUNNING[0]:
                nn.Module.__call__ = _CALL  # type: ignore[method-assign]
        _ROUTES.reset(token)


class _Live(Live):
    """Knows the most bytes that were held at once, too."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.bytes())
        return result
