"""The oracle of slice rules: an operator run slice by slice gives the slices of the operator run whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxstream.passes.operators.axes import Call, Cut, Slice, backward, forward, with_arguments

aten = torch.ops.aten
COMPARABLE = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), aten.reshape.default),
    aten.empty_like.default: aten.zeros_like.default,
    aten.empty.memory_format: aten.zeros.default,
    aten.new_empty.default: aten.new_zeros.default,
}
"""What stands for operators here: parts of a tensor have strides that a view may refuse, and empty ones any values."""


def run(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the operator returns."""
    return COMPARABLE.get(target, target)(*args, **kwargs)


def call_of(target: OpOverload, *args: Any, **kwargs: Any) -> Call:
    """The call of an operator with real tensors."""
    return Call(target, args, kwargs, run(target, args, kwargs))


def slices(shape: Sequence[int]) -> Iterator[Slice]:
    """Every way in which an axis longer than 1 may lie in a tensor."""
    for dim, size in enumerate(shape):
        for extent in range(2, size + 1):
            for outer in range(1, size // extent + 1):
                if size % (extent * outer) == 0:
                    yield Slice(dim, extent, outer, size // (extent * outer))


def run_part(call: Call, cut: Cut, out: Slice, start: int, length: int) -> Any:
    """What the cut computes for the part [start, start + length) of its axis."""
    window = cut.window((start, start + length))
    arguments, first = cut.place((start, start + length), window)
    parts = iter(
        tensor if piece is None else piece.of(tensor, window[0], window[1] - window[0])
        for tensor, piece in zip(call.tensors, cut.inputs, strict=True)
    )

    def part(leaf: Any) -> Any:
        return next(parts) if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(part, (call.args, dict(call.kwargs)))
    args, kwargs = with_arguments(call.target, args, kwargs, arguments)
    result = run(call.target, args, kwargs)
    if cut.halo is None:
        return result
    assert first <= start
    return result.narrow(out.dim, start - first, length)


def check(call: Call, out: Slice, random: Random) -> Cut | None:
    """Hold the rule to its word for one slice and a ragged partition of its axis; None where the axis stops."""
    cut = backward(call, out)
    if cut is None:
        return None
    for tensor, piece in zip(call.tensors, cut.inputs, strict=True):
        assert piece is None or tensor.shape[piece.dim] == piece.size
        assert piece is None or cut.halo is not None or piece.extent == out.extent
    start = 0
    while start < out.extent:
        length = random.randint(1, out.extent - start)
        parts = pytree.tree_leaves(run_part(call, cut, out, start, length))
        for part, whole in zip(parts, pytree.tree_leaves(call.out), strict=True):
            if whole is None:
                continue
            torch.testing.assert_close(part, out.of(whole, start, length), rtol=1e-9, atol=1e-9, equal_nan=True)
        start += length
    known = {index: piece for index, piece in enumerate(cut.inputs) if piece is not None}
    found = forward(call, known) if known else None
    if found is None:  # the search tries few of the ways to lie in the middle of a dimension
        assert not known or (out.outer > 1 and out.inner > 1)
    else:
        assert all(found[1].inputs[index] == piece for index, piece in known.items())
    return cut
