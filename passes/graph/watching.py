"""Watching: numbers and lists that tell when a forward reads them, to know a counter that nothing depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_FORWARD: ContextVar[bool] = ContextVar("_FORWARD", default=False)


@contextmanager
def forward_runs() -> Iterator[None]:
    """What reads a watched value meanwhile is the model."""
    token = _FORWARD.set(True)
    try:
        yield
    finally:
        _FORWARD.reset(token)


def watching(value: Any, tell: Callable[[str], Any]) -> Any:
    """A value like this one that tells when it is read, None for a kind that can't.

    A number that is added to, and a list that is appended to, are not read by that.
    """
    kind = {int: _Int, float: _Float, list: _List}.get(type(value))
    if kind is None:
        return None
    made = kind(value)
    made.tell = tell
    return made


def _told(name: str) -> Any:
    def method(self: Any, *args: Any) -> Any:
        if _FORWARD.get():
            self.tell(name)
        return getattr(type(self).__mro__[1], name)(self, *args)

    return method


def _counting(name: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        base = type(self).__mro__[1]
        result = getattr(base, name)(self, other)
        if type(result) is not base:
            if _FORWARD.get():
                self.tell(name)
            return result
        made = type(self)(result)
        made.tell = self.tell
        return made

    return method


_SETTING = ("__new__", "__init__", "__getattribute__", "__setattr__", "__class__", "__init_subclass__", "__dict__")
_ADDING = ("__add__", "__radd__", "__sub__", "__rsub__")
_GROWING = ("append", "extend", "__iadd__", "__setitem__", "insert", "__doc__", "__subclasshook__", "__class_getitem__")


def _kind(base: type) -> type:
    """A subclass of a number's or a list's class that tells of everything but being added to."""
    adding = _ADDING if base is not list else ()
    methods = {name: _counting(name) for name in adding if hasattr(base, name)}
    for name in dir(base):
        if callable(getattr(base, name)) and name not in (*_SETTING, *adding, *_GROWING):
            methods[name] = _told(name)
    return type(f"_{base.__name__.capitalize()}", (base,), methods)


_Int, _Float, _List = map(_kind, (int, float, list))
