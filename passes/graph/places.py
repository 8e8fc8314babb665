"""Places: where a value is, from the roots of a snapshot on, and what is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxstream.passes.graph.parts import ABSENT, WEIGHTS, Step, parts_of, refill, set_part

Place = tuple[Step, ...]
"""Where a value is: a root, by its name, and the steps from there."""


def value_at(place: Place, roots: Mapping[str, Any]) -> Any:
    """What is at a place now, ``ABSENT`` where nothing is."""
    (_, name), *steps = place
    value = roots.get(name, ABSENT)
    for step in steps:
        parts = parts_of(value, True)
        value = ABSENT if parts is None else parts.get(step, ABSENT)
    return value


def put(place: Place, roots: Mapping[str, Any], value: Any, more: bool = False) -> None:
    """Set what is at a place; with ``more`` its list goes on by these values. ``ABSENT`` takes it away."""
    owner, (kind, name) = value_at(place[:-1], roots), place[-1]
    if kind == "content":
        refill(owner, [*owner, *value] if more else value)
    else:
        set_part(owner, (kind, name), value)


def describe(place: Place) -> str:
    """A place as a user would write it, from the model on: ``blocks.0.scale``, ``cache['a'][0]``."""
    text = "" if place[0] == ("root", "model") else str(place[0][1])
    before = ""
    for kind, name in place[1:]:
        if kind == "attribute" and name in ("_modules", *WEIGHTS):
            pass
        elif kind == "item" and before not in ("_modules", *WEIGHTS):
            text += f"[{name!r}]"
        elif kind == "class":
            text = name.__qualname__
        elif kind == "module":
            text = f"{name[0].__name__}.{name[1]}"
        elif kind == "global":
            text = str(name)
        elif kind not in ("content", "function", "self", "bytes", "position"):
            text += f".{name}" if text else str(name)
        before = name if kind == "attribute" else ""
    return text


def owner_of(place: Place, roots: Mapping[str, Any]) -> tuple[str, Any]:
    """The path and the value of the innermost submodule that a place is in, ``("", model)`` at the top."""
    path, found = "", roots["model"]
    for length in range(1, len(place)):
        if place[length - 1] == ("attribute", "_modules"):
            module = value_at(place[: length + 1], roots)
            if isinstance(module, nn.Module):
                path, found = describe(place[: length + 1]), module
    return path, found
