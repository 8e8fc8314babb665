"""What the families share: cuts written by argument name, and the shapes that most rules come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from fxstream.passes.operators.axes import Call, Cut, Halo, Slice, Span, rule

Resize = Callable[[int], Mapping[str, Any]]
Piece = Slice | None


@cache
def names(operator: OpOverload) -> tuple[str, ...]:
    """Argument names of an operator in the order of its schema."""
    return tuple(argument.name for argument in operator._schema.arguments)


def cut(call: Call, pieces: Mapping[str, Any], resize: Resize | None = None) -> Cut:
    """The cut that reads ``pieces`` by argument name (a list of them for a list of tensors), all else whole."""
    inputs = _inputs(call, pieces)
    return Cut(inputs) if resize is None else Cut(inputs, resize)


def _inputs(call: Call, pieces: Mapping[str, Any]) -> tuple[Piece, ...]:
    inputs: list[Piece] = []
    for name, value in (*zip(names(call.target), call.args, strict=False), *call.kwargs.items()):
        if isinstance(value, torch.Tensor):
            inputs.append(pieces.get(name))
        elif isinstance(value, (list, tuple)):
            count = sum(isinstance(item, torch.Tensor) for item in value)
            inputs.extend(pieces.get(name) or [None] * count)
    return tuple(inputs)


def lead(call: Call, piece: Piece, resize: Resize | None = None) -> Cut | None:
    """The cut that reads a piece of the operator's first argument, all else whole; None where no piece was found."""
    return None if piece is None else cut(call, {names(call.target)[0]: piece}, resize)


def haloed(
    call: Call,
    out: Slice,
    reads: Callable[[int], tuple[int, int]],
    scale: Fraction | int,
    place: Callable[[Span, Span, bool], tuple[Mapping[str, Any], int]],
    align: int = 1,
    least: int = 1,
) -> Cut | None:
    """The cut of the whole of a dimension whose step ``i`` is computed of the steps ``reads(i)`` of the input's.

    ``reads`` gives the first and the last of them, without regard to the border, and grows by ``scale`` steps on
    average. ``place(part, window, clipped)`` is as for ``Halo``; a window that was clipped at a border begins at a
    multiple of ``align`` and has ``least`` steps, if there are as many.
    """
    if out.outer * out.inner > 1:
        return None
    size = source(call).shape[out.dim]

    def wanted(part: Span) -> Span:
        return reads(part[0])[0], reads(part[1] - 1)[1] + 1

    def window(part: Span) -> Span:
        low, high = wanted(part)
        if low >= 0 and high <= size:
            return low, high
        low = max(min(low, size - least), 0) // align * align
        return low, min(max(high, low + least), size)

    def placed(part: Span, window: Span) -> tuple[Mapping[str, Any], int]:
        low, high = wanted(part)
        return place(part, window, low < 0 or high > size)

    middle = out.extent // 2
    first, last = reads(middle)
    overlap = last - first + 1 - Fraction(scale)
    halo = Halo(window, placed, max(overlap, Fraction(0)))
    return Cut(_inputs(call, {names(call.target)[0]: Slice(out.dim, size)}), halo=halo)


def replaced(values: int | Sequence[int], position: int, rank: int, value: int) -> list[int]:
    """An argument with an entry for each of ``rank`` dimensions, or one for all, with one entry replaced."""
    if isinstance(values, int) or len(values) == 1:
        values = [values if isinstance(values, int) else values[0]] * rank
    return [value if index == position else entry for index, entry in enumerate(values)]


def source(call: Call) -> torch.Tensor:
    """The operator's first argument."""
    return call.arguments[names(call.target)[0]]


def aligned(tensor: torch.Tensor, rank: int, out: Slice) -> Piece:
    """The piece of an input that broadcasts to an output of ``rank`` dimensions; whole where it is repeated."""
    dim = out.dim - rank + tensor.dim()
    return None if dim < 0 or tensor.shape[dim] == 1 else out.at(dim)


def broadcast(call: Call, out: Slice, resize: Resize | None = None) -> Cut:
    """Every input broadcasts to the output, element by element."""
    inputs = tuple(aligned(tensor, len(call.shape), out) for tensor in call.tensors)
    return Cut(inputs) if resize is None else Cut(inputs, resize)


def dims(value: int | Sequence[int] | None, rank: int) -> set[int]:
    """Dimensions named by a ``dim`` argument, none negative; all of them where it names none."""
    if value is None or value == []:
        return set(range(rank))
    return {dim % rank for dim in ([value] if isinstance(value, int) else value)}


def independent(*operators: OpOverload, but: Callable[[Call], Iterable[int]]) -> None:
    """Register operators that keep the rank of their first argument and mix only its dimensions ``but``."""

    @rule(*operators)
    def keep(call: Call, out: Slice) -> Cut | None:
        rank = len(call.shape)
        return None if any(out.dim == dim % rank for dim in but(call)) else lead(call, out)


def trailing(count: int) -> Callable[[Call], Iterable[int]]:
    """The last ``count`` dimensions, for ``independent``."""
    return lambda call: range(-count, 0)
