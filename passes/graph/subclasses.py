"""Subclasses: weights of a class of their own, such as quantized ones.

Some hold other tensors and tell them by ``__tensor_flatten__``: those are a graph's weights. Others are plain memory
with attributes and methods: a trace puts fake tensors in their place that know neither, so these are dressed as what
they stand for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from types import FunctionType, MethodType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxstream.errors import CaptureError
from fxstream.passes.graph.parts import UNDRESSED, WEIGHTS, is_plain, parts_of

Dress = tuple[nn.Module, str, str, type, dict[str, Any]]
"""A weight by its module, the dictionary and the name there, the class that it is of, and its attributes."""


def plain_tensors(tensor: Tensor, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors that a weight holds its numbers in, each by its path from there: itself, if it is plain memory."""
    if not is_traceable_wrapper_subclass(tensor):
        yield path, tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name), f"{path}.{name}")


def weights_of(module: nn.Module) -> list[Tensor]:
    """The plain tensors of a model's parameters and buffers, those in their attributes among them, each once."""
    found: dict[int, Tensor] = {}
    for weight in (*module.parameters(), *module.buffers()):
        for _, tensor in plain_tensors(weight):
            found[id(tensor)] = tensor
            found.update((id(each), each) for each in _in_attributes(tensor))
    return list(found.values())


def _in_attributes(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight of a class of its own has beside its memory, such as the scales of its blocks."""
    met: set[int] = set()
    waiting: list[Any] = list((parts_of(tensor, False) or {}).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in met and not isinstance(value, (nn.Module, type, FunctionType, MethodType)):
            met.add(id(value))
            waiting += (parts_of(value, False) or {}).values()


def detach_wrapped(twin: nn.Module) -> None:
    """Let no weight of a twin that holds others require a gradient, which those of whole numbers can't.

    ``torch.export`` asks it of them.
    """
    for table in (vars(module)["_parameters"] for module in twin.modules()):
        for name, weight in table.items():
            if weight is not None and weight.requires_grad and is_traceable_wrapper_subclass(weight):
                table[name] = nn.Parameter(table[name].detach(), requires_grad=False)


def dresses(twin: nn.Module, of: Callable[[Any], Any]) -> list[Dress]:
    """The weights of a twin that a trace will have to dress; ``of`` gives what stands there for a value of the model.

    Raises ``CaptureError`` for one that is neither plain memory nor tells what it holds.
    """
    found: list[Dress] = []
    for path, module in twin.named_modules():
        for table in WEIGHTS:
            for name, weight in vars(module)[table].items():
                if weight is None or not is_plain(type(weight)) or is_traceable_wrapper_subclass(weight):
                    continue
                kind: Any = _worn(type(weight))
                if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
                    raise CaptureError(
                        f"{path}.{name} is a {kind.__qualname__}, which answers for every operator itself and does not "
                        "tell what it holds (by __tensor_flatten__), so fxstream can't capture it",
                        module_path=path,
                    )
                found.append((module, table, name, kind, {key: of(x) for key, x in _attributes(weight).items()}))
    return found


@contextmanager
def dressed(weights: Sequence[Dress]) -> Iterator[None]:
    """While a forward is traced, let the fake tensors in place of these weights be of their class, with its attributes.

    So is what the class makes of them. Attributes that the forward sets are in them, for all to see.
    """
    undressed = []
    for module, table, name, kind, attributes in weights:
        tensor = vars(module)[table][name]
        if not isinstance(tensor, kind):
            undressed.append((tensor, type(tensor)))
            _put_on(tensor, kind, attributes)
    try:
        with dressing():
            yield
    finally:
        for tensor, fake in undressed:
            tensor.__class__ = fake


@contextmanager
def dressing() -> Iterator[None]:
    """Let classes of tensors make theirs of fake ones, in this thread."""
    make, thread = Tensor._make_subclass, get_ident()

    def make_subclass(kind: type, data: Tensor, require_grad: bool = False, **more: Any) -> Tensor:
        if get_ident() != thread or not isinstance(data, FakeTensor):
            return make(kind, data, require_grad, **more)
        with torch._C.DisableTorchFunctionSubclass():
            alias = data.detach()
        return alias if kind in (Tensor, nn.Parameter) else _put_on(alias, kind, {})

    with patch.object(Tensor, "_make_subclass", make_subclass):
        yield


def fake_like(weight: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor without memory of a weight's class, with its attributes and layout; what it holds is fake, too."""
    if is_traceable_wrapper_subclass(weight):
        names, context = weight.__tensor_flatten__()
        inner = {name: fake_like(getattr(weight, name), mode) for name in names}
        fake: Tensor = type(weight).__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    else:
        with mode:
            fake = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
    if isinstance(weight, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=False)
    plain = is_plain(type(weight)) and not is_traceable_wrapper_subclass(weight)
    return _put_on(fake, _worn(type(weight)), _attributes(weight)) if plain else fake


def _put_on(tensor: Tensor, kind: type, attributes: Mapping[str, Any]) -> Tensor:
    before = frozenset(vars(tensor))
    tensor.__class__ = _dress(kind, type(tensor))
    vars(tensor).update({UNDRESSED: before, **attributes})
    return tensor


def _attributes(tensor: Tensor) -> dict[str, Any]:
    return {name: part for (kind, name), part in (parts_of(tensor, False) or {}).items() if kind == "attribute"}


@functools.cache
def _dress(kind: type, fake: type) -> type:
    """A fake tensor's class that is the other as well."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind, fake), names)


def _worn(kind: type) -> type:
    """The class that a dressed tensor stands for; any other is itself."""
    return kind.__bases__[0] if issubclass(kind, FakeTensor) and kind is not FakeTensor else kind
