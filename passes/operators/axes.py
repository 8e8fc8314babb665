"""Slice axes: how one slice of an operator's output is made from slices of its inputs.

An axis has an extent. A tensor lies under it whole (``None``) or as a ``Slice`` of one of its dimensions.
For each ATen operator one rule relates the slice of the output to those of the inputs; an operator
without a rule, or whose rule answers ``None``, is a barrier: the axis stops there.

    @rule(aten.linear.default)
    def linear(call: Call, out: Slice) -> Cut | None:
        ...

A rule is right when, for every ``Slice`` it accepts, running the operator slice by slice gives the slices of
running it whole. ``tests/passes/operators/test_rules.py`` holds every registered rule to that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxstream.runtime.loop import Slice


@dataclass(frozen=True)
class Call:
    """One operator call as rules see it: tensors stand in ``args`` and ``kwargs`` with their whole shapes.

    ``out`` is the tensor that the call returns, or the list of them.
    """

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        """Tensor arguments in the order of ``tree_leaves((args, kwargs))``."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output; of the first one where there are several."""
        out = self.out[0] if isinstance(self.out, (list, tuple)) else self.out
        return tuple(out.shape)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Every argument by its schema name, defaults filled in."""
        bound: dict[str, Any] = {}
        for position, argument in enumerate(self.target._schema.arguments):
            if position < len(self.args):
                bound[argument.name] = self.args[position]
            elif argument.name in self.kwargs:
                bound[argument.name] = self.kwargs[argument.name]
            else:
                bound[argument.name] = argument.default_value
        return bound


def _no_resize(length: int) -> Mapping[str, Any]:
    return {}


Span = tuple[int, int]
"""The part [start, stop) of an axis, in steps of it."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Halo:
    """How an operator reads more of its input than the slice that it computes, or less.

    ``window`` gives, for the part of the output wanted, the part of the input to read. ``place`` gives, for both, the
    arguments (by schema name) to run the operator with on that window, and the step of the output that its result
    then begins at: at or before the part wanted, which may end before the result does.

    ``overlap`` is how many steps a part reads beyond those that are its own, where no border is near.
    """

    window: Callable[[Span], Span]
    place: Callable[[Span, Span], tuple[Arguments, int]]
    overlap: Fraction


@dataclass(frozen=True)
class Cut:
    """How a slice of the output is computed.

    ``inputs`` aligns with ``Call.tensors``: the ``Slice`` to read of each, or ``None`` to read it whole.
    ``resize`` gives, for a slice of ``length`` steps, the arguments (by schema name) that depend on its size,
    such as the shape of a view. Where the inputs' slices are not of the same steps as the output's, their extents may
    differ and ``halo`` tells what is read and how.
    """

    inputs: tuple[Slice | None, ...]
    resize: Callable[[int], Arguments] = field(default=_no_resize)
    halo: Halo | None = None

    def window(self, part: Span) -> Span:
        """The part of the inputs' axis that a part of the output's is computed from."""
        return part if self.halo is None else self.halo.window(part)

    @property
    def reach(self) -> float:
        """The share of the axis that is read beyond a slice's own part."""
        if self.halo is None:
            return 0.0
        return float(self.halo.overlap) / next(piece.extent for piece in self.inputs if piece is not None)

    def place(self, part: Span, window: Span) -> tuple[Arguments, int]:
        """The arguments to compute a part of the output with, and the first step of what they compute."""
        return (self.resize(part[1] - part[0]), part[0]) if self.halo is None else self.halo.place(part, window)


__all__ = [
    *("Call", "Cut", "Halo", "Rule", "Slice", "Span", "backward", "forward", "is_named", "registered", "rule"),
    *("rule_of", "with_arguments"),
]


def with_arguments(
    target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call, some arguments replaced by schema name; positional where the schema has them so."""
    names = [argument.name for argument in target._schema.arguments]
    replaced, named = list(args), dict(kwargs)
    for name, value in values.items():
        position = names.index(name)
        if target._schema.arguments[position].kwarg_only:
            named[name] = value
            continue
        for argument in target._schema.arguments[len(replaced) : position + 1]:
            replaced.append(named.pop(argument.name, argument.default_value))
        replaced[position] = value
    return tuple(replaced), named


Rule = Callable[[Call, Slice], "Cut | None"]
_RULES: dict[OpOverload | str, Rule] = {}


def rule(*operators: OpOverload | str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, in place of any that they had.

    One of a library that may not be there goes by its name, such as ``"bitsandbytes::gemm_4bit"``. It is known to do
    nothing but compute.
    """

    def register(function: Rule) -> Rule:
        for operator in operators:
            _RULES[operator] = function
        return function

    return register


def is_named(operator: OpOverload) -> bool:
    """Whether an operator is one of a library's that have a rule by name."""
    return operator.name() in _RULES


def rule_of(operator: OpOverload) -> Rule | None:
    return _RULES.get(operator) or _RULES.get(operator.name())


def registered() -> frozenset[OpOverload | str]:
    """The operators that have a rule, those of libraries by name."""
    return frozenset(_RULES)


def backward(call: Call, out: Slice) -> Cut | None:
    """The cut that makes the slice ``out`` of the call's output, or None where the axis stops."""
    function = rule_of(call.target)
    if function is None or out.extent < 1 or out.dim >= len(call.shape) or call.shape[out.dim] != out.size:
        return None
    return function(call, out)


def forward(call: Call, known: Mapping[int, Slice]) -> tuple[Slice, Cut] | None:
    """The slice of the output that needs just the slices ``known`` (by index into ``call.tensors``).

    None where there is none: the call mixes what the axis keeps apart.
    """
    if rule_of(call.target) is None:
        return None
    first = next(iter(known))
    for out in _candidates(known[first], tuple(call.tensors[first].shape), call.shape):
        cut = backward(call, out)
        if cut is not None and all(cut.inputs[index] == piece for index, piece in known.items()):
            return out, cut
    return None


def _candidates(piece: Slice, shape: Sequence[int], out: Sequence[int]) -> Iterator[Slice]:
    """Slices of an output of shape ``out`` that may belong to ``piece`` of an input of ``shape``."""
    seen = set()
    if piece.size == piece.extent and piece.dim < len(out):  # all steps of a dimension that may change its size
        seen.add(Slice(piece.dim, out[piece.dim]))
        yield Slice(piece.dim, out[piece.dim])
    outer = prod(shape[: piece.dim]) * piece.outer
    inner = prod(shape[piece.dim + 1 :]) * piece.inner
    order = sorted(range(len(out)), key=lambda dim: dim != piece.dim)
    for dim in order:
        if out[dim] % piece.extent:
            continue
        rest = out[dim] // piece.extent
        before, after = prod(out[:dim]), prod(out[dim + 1 :])
        for o, i in (
            (piece.outer, piece.inner),
            (outer // before if before else 0, inner // after if after else 0),
            (1, rest),
            (rest, 1),
        ):
            candidate = Slice(dim, piece.extent, o, i)
            if o and i and candidate.size == out[dim] and candidate not in seen:
                seen.add(candidate)
                yield candidate
