"""Barriers: operators without a rule, at which every axis stops."""

from __future__ import annotations

from dataclasses import dataclass

from torch._ops import OpOverload

from fxstream.passes.operators.axes import registered
from fxstream.passes.planning.program import Program


@dataclass(frozen=True)
class Barrier:
    """An operator without a rule: how many nodes call it, and the most bytes live during one of them."""

    operator: str
    count: int
    bytes: int


def barriers(program: Program) -> tuple[Barrier, ...]:
    """The operators of a program that have no rule and read a tensor, the one that blocks most bytes first."""
    rules = registered()
    found: dict[str, list[int]] = {}
    for value, live in zip(program.values, program.live_bytes, strict=True):
        target = value.node.target
        if isinstance(target, OpOverload) and target not in rules and value.reads:
            found.setdefault(str(target), []).append(live)
    listed = [Barrier(name, len(live), max(live)) for name, live in found.items()]
    return tuple(sorted(listed, key=lambda barrier: -barrier.bytes))
