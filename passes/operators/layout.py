"""Layouts: which addresses a slice of a tensor touches."""

from __future__ import annotations

from typing import Any

import torch

from fxstream.runtime.loop import Slice


def slice_layout(tensor: torch.Tensor, piece: Slice) -> Any:
    """A value that is equal for two tensors whose slices, step by step of the axis, lie at the same addresses.

    Relative to the start of the storage; None where the tensor's elements overlap, or are conjugates or negatives of
    what lies there. Dimensions are split at the axis, sorted by stride and merged again where they are adjacent in
    memory.
    """
    if tensor.is_conj() or tensor.is_neg():
        return None
    parts: list[tuple[int, int, bool]] = []
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if dim == piece.dim:
            step = stride * piece.inner
            parts += [
                (step * piece.extent, piece.outer, False),
                (step, piece.extent, True),
                (stride, piece.inner, False),
            ]
        else:
            parts.append((stride, size, False))
    parts = sorted((part for part in parts if part[1] > 1 or part[2]), reverse=True)
    merged: list[tuple[int, int, bool]] = []
    for stride, size, axis in parts:
        if stride == 0:
            return None
        if merged and not axis and not merged[-1][2] and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size, False)
        else:
            merged.append((stride, size, axis))
    return tensor.storage_offset(), tensor.dtype, tuple(merged)


def offset_bytes(layout: Any) -> int:
    """Bytes of the storage before the tensor's first element."""
    offset, dtype, _ = layout
    return int(offset * dtype.itemsize)


def lies_within(layout: Any, other: Any) -> bool:
    """Whether a slice of one layout touches no address that the same slice of the other doesn't, offsets apart."""
    (_, dtype, parts), (_, other_dtype, others) = layout, other
    sizes = {(stride, axis): size for stride, size, axis in others}
    fits = all(sizes.get((stride, axis), 0) >= size for stride, size, axis in parts)
    axes = [[part for part in each if part[2]] for each in (parts, others)]
    return dtype == other_dtype and fits and axes[0] == axes[1]


def lies_behind(layout: Any, other: Any) -> bool:
    """Whether a slice of one layout touches no address that a later slice of the other does, offsets apart.

    So it is, also where the two differ inside, for slices one after the other in memory and no longer than the other's.
    """
    (_, dtype, parts), (_, other_dtype, others) = layout, other
    (step, extent, axis), (other_step, *other_axis) = parts[0], others[0]
    inside = sum(stride * (size - 1) for stride, size, _ in parts[1:])
    return dtype == other_dtype and axis and other_axis == [extent, axis] and inside < step <= other_step
