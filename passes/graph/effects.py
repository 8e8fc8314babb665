"""Effects: what a node does beside making its value. It writes to tensors, or draws random numbers.

Effects keep the model's order among each other, and none is dropped, made twice or done slice by slice: every pass that
moves, copies or drops nodes asks here. Draws differ from writes in one thing: they touch no tensor that another node
reads, so what reads no random number may be moved across them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

CHANCES = ("dropout_p", "dropout")
"""Arguments by which an operator drops out nothing, and draws nothing, where they are zero."""

TRAINING = ("train", "training")
"""Arguments by which an operator draws nothing where they are false."""


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers, from whatever generator."""
    return isinstance(node.target, OpOverload) and target_draws(node.target, node.args, node.kwargs)


def target_draws(target: OpOverload, args: Any, kwargs: Any) -> bool:
    """Whether a call of an operator draws. What may drop out has a tag that says so though it drops nothing."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    schema = target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
    nothing = [name for name in CHANCES if name in given and not given[name]]
    return not nothing and not any(given.get(name) is False for name in TRAINING)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors a node writes to."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            fx.map_arg(value, found.append)
    return found


def memories(value: Any) -> set[int]:
    """The storages under a node's value."""
    values = value if isinstance(value, (list, tuple)) else (value,)
    return {x.untyped_storage()._cdata for x in values if isinstance(x, FakeTensor)}


def writes(node: fx.Node) -> bool:
    """Whether a node writes to a tensor that it is given."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def has_effect(node: fx.Node) -> bool:
    """Whether a node draws or writes."""
    return writes(node) or draws(node)


def stays(node: fx.Node) -> bool:
    """Whether a node stays in its graph though nothing reads it."""
    return node.op in ("placeholder", "output") or has_effect(node)


def first_write(nodes: Iterable[fx.Node]) -> int | None:
    """Position of the first of these nodes that writes."""
    return next((index for index, node in enumerate(nodes) if writes(node)), None)
