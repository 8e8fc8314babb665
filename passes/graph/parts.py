"""Parts: how the values that a model reaches come apart, and how a part of one is set."""

from __future__ import annotations

import enum
import functools
import sys
import types
from array import array
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from fxstream.passes.graph.structure import slots

Step = tuple[str, Any]
"""One step from a value to a part of it: how, and by what name."""


TARGET = "_streamed_target"
"""Name under which a streamed module holds what it was made of."""


HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


WEIGHTS = ("_parameters", "_buffers")


BOOKKEEPING = {*vars(nn.Module())} - {"training", "_modules", *WEIGHTS, *HOOKS}
"""What torch keeps in every module, and no forward reads."""


ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, range, slice}


_LIBRARY = {*sys.stdlib_module_names, "torch", "numpy", "fxstream"}


_OPENED = (types.SimpleNamespace, UserDict, UserList, ChainMap)
"""Classes of the standard library whose objects are plain."""


CACHED: Any = type(functools.cache(lambda: None))


_WRAPPERS = (staticmethod, classmethod, property, functools.cached_property)


UNDRESSED = "_undressed_names"
"""Name under which a fake tensor that is dressed as another class has those of its own attributes."""


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
"""Stands for the value of what is not there."""


POSITION: Step = ("position", None)
"""The step to where an iterator is, which nothing can set."""


BYTES: Step = ("bytes", None)


MISSES: Step = ("misses", None)


_IMMUTABLE, _HEAP = 1 << 8, 1 << 9  # of a type's flags


def parts_of(value: Any, code: bool) -> dict[Step, Any] | None:
    """The parts of a value that has some, by the steps to them; None for one that is known by itself alone."""
    kind = type(value)
    if kind in ATOMS or isinstance(value, enum.Enum):
        return None
    if isinstance(value, torch.Tensor):
        return _tensor_parts(value)
    if isinstance(value, nn.Module):
        if TARGET in vars(value):
            return {("attribute", "_original"): vars(value)["_original"]}
        parts = {("attribute", name): part for name, part in vars(value).items() if name not in BOOKKEEPING}
        return {**parts, **_classes(kind)}
    if isinstance(value, type):
        return _class_parts(value, code)
    if isinstance(value, types.FunctionType):
        return _function_parts(value, code)
    if isinstance(value, types.GeneratorType):
        return {POSITION: value.gi_frame.f_lasti if value.gi_frame else None}
    if kind.__module__ == "itertools":
        return {POSITION: repr(value)}
    if isinstance(value, types.MethodType):
        return {("function", None): value.__func__, ("self", None): value.__self__}
    if isinstance(value, functools.partial):
        return {
            ("attribute", "func"): value.func,
            ("attribute", "args"): value.args,
            ("attribute", "keywords"): value.keywords,
        }
    if is_array(value):
        about = (value.shape, value.strides, str(value.dtype)) if hasattr(value, "shape") else len(value)
        return {BYTES: bytes(value), ("about", None): about}
    if code and isinstance(value, CACHED):
        return {("function", None): value.__wrapped__, MISSES: value.cache_info().misses}
    if code and isinstance(value, _WRAPPERS):
        return {("function", None): bare(value)}
    return _object_parts(value)


def _object_parts(value: Any) -> dict[Step, Any] | None:
    kind = type(value)
    if isinstance(value, dict):
        items = OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value)
        parts: dict[Step, Any] = {("item", name): part for name, part in items}
    elif isinstance(value, types.MappingProxyType):
        parts = {("item", name): part for name, part in value.items()}
    elif isinstance(value, (list, tuple, deque)):
        parts = {("item", index): part for index, part in enumerate(_elements(value))}
    elif isinstance(value, (set, frozenset)):
        parts = {("element", part): part for part in _elements(value)}
    elif not is_plain(kind):
        return None
    else:
        parts = {}
    if is_plain(kind):
        parts.update((("attribute", name), part) for name, part in attributes_of(value).items())
        parts.update((("attribute", name), getattr(value, name)) for name in slots(kind) if hasattr(value, name))
        parts.update(_classes(kind))
    return parts


def _tensor_parts(value: torch.Tensor) -> dict[Step, Any] | None:
    """The attributes of a tensor of a class that is neither torch's nor a dress over nothing."""
    if not is_plain(type(value)):
        return None
    own = vars(value)
    hidden = {UNDRESSED, *own.get(UNDRESSED, ())}
    return {("attribute", name): part for name, part in own.items() if name not in hidden}


def _elements(value: Any) -> Iterator[Any]:
    """What a sequence or a set holds, whatever its class makes of iteration."""
    base = next(base for base in (list, tuple, deque, set, frozenset) if isinstance(value, base))
    return base.__iter__(value)


def attributes_of(value: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}


def _class_parts(value: type, code: bool) -> dict[Step, Any] | None:
    if value.__flags__ & _IMMUTABLE and not is_ours(value.__module__):
        return None
    ours = is_ours(value.__module__)
    return {
        ("attribute" if ours and not _is_method(part) else "method", name): part
        for name, part in vars(value).items()
        if not name.startswith("__") or name == "__call__"
    }


def bare(method: Any) -> Any:
    """The function that a class holds as a static method, a class method or a property."""
    for name in ("__func__", "fget", "func"):
        method = getattr(method, name, method) if isinstance(method, _WRAPPERS) else method
    return method


def _is_method(part: Any) -> bool:
    return isinstance(part, (types.FunctionType, CACHED, type, *_WRAPPERS))


def _function_parts(value: types.FunctionType, code: bool) -> dict[Step, Any]:
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    parts: dict[Step, Any] = {("code", None): value.__code__}
    parts.update((("cell", name), in_cell(cell)) for name, cell in cells if name != "__class__")
    parts.update((("default", index), part) for index, part in enumerate(value.__defaults__ or ()))
    parts.update((("keyword", name), part) for name, part in (value.__kwdefaults__ or {}).items())
    parts.update((("attribute", name), part) for name, part in vars(value).items())
    if code and is_ours(value.__module__):
        names = names_in(value.__code__)
        parts.update(_named(value.__globals__, names))
    return parts


def _named(space: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[Step, Any]]:
    """The globals of these names, and in modules among them what is named so there."""
    for name in names:
        if name not in space:
            continue
        value = space[name]
        if not isinstance(value, types.ModuleType):
            if _is_read(value):
                yield ("global", name), value
        elif is_ours(value.__name__):
            inside = vars(value)
            yield from (
                (("module", (value, each)), inside[each]) for each in names if each in inside and _is_read(inside[each])
            )


def _is_read(value: Any) -> bool:
    """Whether what a global is, is of the user's making, or holds something."""
    if isinstance(value, types.ModuleType):
        return False
    return not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) or is_ours(value.__module__)


@functools.cache
def names_in(code: types.CodeType) -> tuple[str, ...]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return tuple(dict.fromkeys((*code.co_names, *chain.from_iterable(map(names_in, inner)))))


def is_ours(module: str | None) -> bool:
    """Whether code is the user's: neither torch's nor the standard library's."""
    return isinstance(module, str) and module.partition(".")[0] not in _LIBRARY


def is_plain(kind: type) -> bool:
    """Whether objects of a class are what their attributes are."""
    return kind in _OPENED or (is_ours(kind.__module__) and bool(kind.__flags__ & _HEAP))


def _classes(kind: type) -> dict[Step, Any]:
    return {("class", base): base for base in kind.__mro__[:-1]}


def in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def is_array(value: Any) -> bool:
    """Whether a value is memory that may be written, and that tells what it is."""
    return isinstance(value, (bytearray, array)) or (type(value).__name__ == "ndarray" and not value.dtype.hasobject)


def set_part(owner: Any, step: Step, value: Any) -> None:
    kind, name = step
    if kind == "global":
        owner, kind = owner.__globals__, "item"
    elif kind == "module":
        owner, name, kind = vars(name[0]), name[1], "item"
    if kind == "cell":
        cell = owner.__closure__[owner.__code__.co_freevars.index(name)]
        if value is ABSENT:
            del cell.cell_contents
        else:
            cell.cell_contents = value
    elif kind == "bytes":
        memoryview(owner).cast("B")[:] = value
    elif kind == "item" and value is ABSENT:
        (OrderedDict if isinstance(owner, OrderedDict) else dict).__delitem__(owner, name)
    elif kind == "item":
        base = next(base for base in (OrderedDict, dict, list, deque) if isinstance(owner, base))
        base.__setitem__(owner, name, value)
    elif isinstance(owner, type):
        type.__delattr__(owner, name) if value is ABSENT else type.__setattr__(owner, name, value)
    elif kind == "attribute" and name in slots(type(owner)):
        object.__delattr__(owner, name) if value is ABSENT else object.__setattr__(owner, name, value)
    elif kind == "attribute" and value is ABSENT:
        del attributes_of(owner)[name]
    elif kind == "attribute":
        attributes_of(owner)[name] = value
    else:
        raise TypeError(f"a {kind} can't be set")


def refill(owner: Any, values: Iterable[Any]) -> None:
    if isinstance(owner, list):
        list.__setitem__(owner, slice(None), values)
        return
    values = list(values)
    owner.clear()
    owner.extend(values) if isinstance(owner, deque) else owner.update(values)


def restore(owner: Any, before: Mapping[Step, Any], now: Mapping[Step, Any]) -> None:
    """Give a value the parts back that it had, one by one, in their order."""
    if isinstance(owner, (list, deque, set)):
        kind = "element" if isinstance(owner, set) else "item"
        refill(owner, [part for step, part in before.items() if step[0] == kind])
    if isinstance(owner, (list, deque, set, tuple, frozenset)):
        before, now = ({s: p for s, p in each.items() if s[0] == "attribute"} for each in (before, now))
    lost = [step for step in before if step not in now]
    for step, part in now.items():
        if step not in before:
            set_part(owner, step, ABSENT)
        elif part is not before[step]:
            set_part(owner, step, before[step])
    for step in lost:
        set_part(owner, step, before[step])
    if lost or [step for step in now if step in before] != [*before]:
        for step, part in before.items():  # what was lost came back last
            if step[0] in ("item", "attribute") and not isinstance(owner, type):
                set_part(owner, step, ABSENT)
                set_part(owner, step, part)
