"""Barriers: operators without a rule, at which every axis stops; and those of which no workspace is known."""

from __future__ import annotations

from dataclasses import dataclass

from torch._ops import OpOverload

from fxstream.passes.machine.workspace import is_known
from fxstream.passes.operators.axes import rule_of
from fxstream.passes.planning.program import Program


@dataclass(frozen=True)
class Barrier:
    """An operator that something is missing of: how many nodes call it, and the most bytes live during one of them."""

    operator: str
    count: int
    bytes: int


def barriers(program: Program) -> tuple[Barrier, ...]:
    """The operators of a program that have no rule and read a tensor, the one that blocks most bytes first."""
    found: dict[str, list[int]] = {}
    for value, live in zip(program.values, program.live_bytes, strict=True):
        target = value.node.target
        if isinstance(target, OpOverload) and rule_of(target) is None and value.reads:
            found.setdefault(str(target), []).append(live)
    return _listed(found)


def unmeasured(program: Program) -> tuple[Barrier, ...]:
    """The operators of a program whose workspace is not known and counts as none: they could not be run."""
    found: dict[str, list[int]] = {}
    for value, live in zip(program.values, program.live_bytes, strict=True):
        call = value.call
        if isinstance(call.target, OpOverload) and not is_known(call.target, call.out, call.args, call.kwargs):
            found.setdefault(str(call.target), []).append(live)
    return _listed(found)


def _listed(found: dict[str, list[int]]) -> tuple[Barrier, ...]:
    listed = [Barrier(name, len(live), max(live)) for name, live in found.items()]
    return tuple(sorted(listed, key=lambda barrier: -barrier.bytes))
