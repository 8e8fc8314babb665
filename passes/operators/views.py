"""Operators that move elements without computing: the axis is followed to the dimension that it came from.

A view keeps the linear order of elements, and so keeps how many of them lie before, along and after the axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from fxstream.passes.operators.axes import Call, Cut, Slice, Span, rule
from fxstream.passes.operators.common import broadcast, cut, dims, haloed, lead, source

aten = torch.ops.aten


def same_order(out: Slice, shape: Sequence[int], input_shape: Sequence[int]) -> Slice | None:
    """``out`` of a tensor of ``shape``, in a tensor of ``input_shape`` with the same elements in the same order.

    None where no single dimension of the input holds the whole axis.
    """
    if 0 in shape:
        return None
    before, past = prod(shape[: out.dim]) * out.outer, 1
    for dim, size in enumerate(input_shape):
        outer = before // past
        if before % past == 0 and size % (outer * out.extent) == 0:
            return Slice(dim, out.extent, outer, size // (outer * out.extent))
        past *= size
    return None


def removed(call: Call, out: Slice, gone: set[int]) -> Cut | None:
    """The input has the output's dimensions and those ``gone``."""
    kept = [dim for dim in range(source(call).dim()) if dim not in gone]
    return lead(call, out.at(kept[out.dim]))


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(call: Call, out: Slice) -> Cut | None:
    piece = same_order(out, call.shape, source(call).shape)
    name = "shape" if call.target is aten.reshape.default else "size"
    return lead(call, piece, lambda length: {name: out.resized(call.shape, length)})


@rule(aten.flatten.using_ints)
def flatten(call: Call, out: Slice) -> Cut | None:
    piece = same_order(out, call.shape, source(call).shape)
    return lead(call, piece)


@rule(aten.unflatten.int)
def unflatten(call: Call, out: Slice) -> Cut | None:
    piece = same_order(out, call.shape, source(call).shape)
    first, count = call.arguments["dim"] % source(call).dim(), len(call.arguments["sizes"])
    return lead(call, piece, lambda length: {"sizes": out.resized(call.shape, length)[first : first + count]})


@rule(aten.permute.default)
def permute(call: Call, out: Slice) -> Cut | None:
    return lead(call, out.at(call.arguments["dims"][out.dim] % len(call.shape)))


@rule(aten.transpose.int)
def transpose(call: Call, out: Slice) -> Cut | None:
    first, second = (call.arguments[name] % len(call.shape) for name in ("dim0", "dim1"))
    return lead(call, out.at({first: second, second: first}.get(out.dim, out.dim)))


@rule(aten.t.default)
def t(call: Call, out: Slice) -> Cut | None:
    return lead(call, out.at(len(call.shape) - 1 - out.dim))


@rule(aten.unsqueeze.default)
def unsqueeze(call: Call, out: Slice) -> Cut | None:
    new = call.arguments["dim"] % len(call.shape)
    return None if out.dim == new else lead(call, out.at(out.dim - (out.dim > new)))


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(call: Call, out: Slice) -> Cut | None:
    """A dimension that is named but longer than 1 stays, and can't be cut: it would vanish from a slice of length 1."""
    shape = source(call).shape
    named = dims(call.arguments["dim"], len(shape)) if call.arguments["dim"] != [] else set()
    kept = [dim for dim, size in enumerate(shape) if dim not in named or size > 1]
    return None if kept[out.dim] in named else lead(call, out.at(kept[out.dim]))


@rule(aten.select.int)
def select(call: Call, out: Slice) -> Cut | None:
    return removed(call, out, dims(call.arguments["dim"], source(call).dim()))


@rule(aten.unbind.int)
def unbind(call: Call, out: Slice) -> Cut | None:
    return removed(call, out, dims(call.arguments["dim"], source(call).dim()))


@rule(aten.view_as_real.default)
def view_as_real(call: Call, out: Slice) -> Cut | None:
    return None if out.dim == len(call.shape) - 1 else lead(call, out)


rule(aten.view_as_complex.default)(lead)


@rule(aten.view.dtype)
def view_dtype(call: Call, out: Slice) -> Cut | None:
    """The last dimension's elements are put together, or taken apart, where the types differ in size."""
    same = source(call).element_size() == call.arguments["dtype"].itemsize
    return lead(call, out) if same or out.dim < len(call.shape) - 1 else None


@rule(aten.slice.Tensor)
def slice_(call: Call, out: Slice) -> Cut | None:
    """Along its own dimension: a run of whole blocks (as a chunk is), every step-th element of all of it, or a window
    of at least half of it. Slices of less would lie elsewhere than those of the input that they are computed with.
    """
    dim = call.arguments["dim"] % len(call.shape)
    if out.dim != dim:
        return lead(call, out)
    size, step, block = source(call).shape[dim], call.arguments["step"], out.extent * out.inner
    start = slice(call.arguments["start"], None).indices(size)[0]
    if step == 1 and size % block == start % block == 0:

        def resize(length: int) -> dict[str, int]:
            return {"start": start // out.extent * length, "end": (start + out.size) // out.extent * length}

        return lead(call, Slice(dim, out.extent, size // block, out.inner), resize)
    if size == out.size * step:
        piece = Slice(dim, out.extent, out.outer, out.inner * step)
        return lead(call, piece, lambda length: {"start": start, "end": None})
    if 2 * out.size * step < size:
        return None

    def place(part: Span, window: Span, clipped: bool) -> tuple[Mapping[str, Any], int]:
        return {"start": 0, "end": window[1] - window[0]}, part[0]

    return haloed(call, out, lambda index: (start + index * step,) * 2, step, place)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(call: Call, out: Slice) -> Cut | None:
    """Along its own dimension, where the parts are equal: each of them holds a part of each slice."""
    if out.dim != call.arguments["dim"] % len(call.shape):
        return lead(call, out)
    if any(part.shape[out.dim] != out.size for part in call.out):
        return None
    count = len(call.out)
    piece = Slice(out.dim, out.extent, count * out.outer, out.inner)
    part = out.size // out.extent
    if call.target is aten.split.Tensor:
        return lead(call, piece, lambda length: {"split_size": length * part})
    if call.target is aten.split_with_sizes.default:
        return lead(call, piece, lambda length: {"split_sizes": [length * part] * count})
    return lead(call, piece)


@rule(aten.expand.default)
def expand(call: Call, out: Slice) -> Cut:
    return broadcast(call, out, lambda length: {"size": out.resized(call.shape, length)})


rule(aten.expand_as.default)(broadcast)


@rule(aten.meshgrid.indexing)
def meshgrid(call: Call, out: Slice) -> Cut | None:
    """A dimension for each tensor, the first two in turn where the indexing is "xy"."""
    order = list(range(len(call.shape)))
    if call.arguments["indexing"] == "xy":
        order[:2] = order[1::-1]
    pieces = [out.at(0) if own == order[out.dim] and tensor.dim() else None for own, tensor in enumerate(call.tensors)]
    return cut(call, {"tensors": pieces})


@rule(aten.repeat.default)
def repeat(call: Call, out: Slice) -> Cut | None:
    """Output dimension = (repeats, input): the axis lies in one of the two."""
    dim = out.dim - len(call.shape) + source(call).dim()
    size = source(call).shape[dim] if dim >= 0 else 1
    count = out.size // size
    if size > 1 and out.outer % count == 0:
        return lead(call, Slice(dim, out.extent, out.outer // count, out.inner))
    if out.inner % size == 0:
        repeats = Slice(out.dim, out.extent, out.outer, out.inner // size)
        return cut(call, {}, lambda length: {"repeats": repeats.resized(call.arguments["repeats"], length)})
    return None


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(call: Call, out: Slice) -> Cut | None:
    """Output dimension = (input, repeats): the axis lies in one of the two."""
    dim, count = call.arguments["dim"], call.arguments["repeats"]
    if dim is None:
        return None
    if out.dim != dim % len(call.shape):
        return lead(call, out)
    size, part = source(call).shape[out.dim], out.size // out.extent
    if out.inner % count == 0:
        piece = Slice(out.dim, out.extent, out.outer, out.inner // count)
        return lead(call, piece, lambda length: {"output_size": part * length})
    if out.outer % size == 0:
        return cut(call, {}, lambda length: {"repeats": part // size * length, "output_size": part * length})
    return None
