"""Aliases: which tensors of a call lie over one another in memory.

A graph that only reads serves them as it serves others. One that writes to a tensor was traced for tensors apart: where
what it writes to lies over something else that it is given, its call is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.errors import CaptureError

Extent = tuple[Any, int, int]
"""Where a tensor lies: in which memory, from which byte to which."""


def overlaps(tensors: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """The pairs of these tensors, by their places, that may lie over one another: whose extents do."""
    extents = sorted((*extent(tensor), place) for place, tensor in enumerate(tensors) if tensor.numel())
    return tuple(sorted(_pairs(extents)))


def _pairs(extents: Sequence[tuple[Any, int, int, int]]) -> Iterator[tuple[int, int]]:
    for index, (memory, _, stop, place) in enumerate(extents):
        for other, start, _, another in extents[index + 1 :]:
            if other != memory or start >= stop:
                break
            yield min(place, another), max(place, another)


def extent(tensor: torch.Tensor) -> Extent:
    """The bytes from a tensor's first element to its last."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        memory, start = tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()
    else:
        memory, start = 0, tensor.data_ptr()
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return memory, start, start + (last + 1) * tensor.element_size()


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def refuse_written(tensors: Mapping[str, torch.Tensor], written: Sequence[str], model: str) -> None:
    """Raise ``CaptureError`` where a tensor that is written to lies over another, or over itself."""
    names = [name for name, tensor in tensors.items() if tensor.numel()]
    for name in written:
        if name in names and _is_expanded(tensors[name]):
            raise CaptureError(f"{model} writes to its {name}, of which several elements are one: give it a copy")
    for pair in overlaps([tensors[name] for name in names]):
        one, other = (names[place] for place in pair)
        if one in written or other in written:
            raise CaptureError(
                f"{model} writes to its {one if one in written else other}, which shares memory with its "
                f"{other if one in written else one}: a graph that writes takes them for tensors apart. Give it a copy "
                "of one of them"
            )
