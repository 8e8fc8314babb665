"""The runtime of a sliced loop: a body graph run once a slice, each result stored into a preallocated output.

This file imports torch alone: a rewritten graph needs nothing else of fxstream to run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn


@dataclass(frozen=True, slots=True)
class Slice:
    """Where an axis lies in a tensor: dimension ``dim`` has size ``outer * extent * inner``, in linear order.

    The part [start, start + length) of the axis is that of the middle factor, so an axis inside a merged dimension
    is cut without unmerging the whole. ``dim`` is never negative.
    """

    dim: int
    extent: int
    outer: int = 1
    inner: int = 1

    @property
    def size(self) -> int:
        """Size of the whole dimension."""
        return self.outer * self.extent * self.inner

    def at(self, dim: int) -> Slice:
        """The same axis in another dimension of equal size."""
        return Slice(dim, self.extent, self.outer, self.inner)

    def resized(self, shape: Sequence[int], length: int) -> list[int]:
        """``shape`` of the whole tensor -> shape of a part of ``length`` steps of the axis."""
        sizes = list(shape)
        sizes[self.dim] = self.outer * length * self.inner
        return sizes

    def window(self, tensor: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """A view of the part [start, start + length); with ``outer > 1`` its dimension stays split in three."""
        if self.outer == 1:
            return tensor.narrow(self.dim, start * self.inner, length * self.inner)
        parts = tensor.unflatten(self.dim, (self.outer, self.extent, self.inner))
        return parts.narrow(self.dim + 1, start, length)

    def of(self, tensor: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """The part [start, start + length) in the tensor's own rank: a view where strides allow one, else a copy."""
        window = self.window(tensor, start, length)
        return window if self.outer == 1 else window.flatten(self.dim, self.dim + 2)

    def store(self, whole: torch.Tensor, start: int, part: torch.Tensor) -> None:
        """Write ``part`` as the slice of ``whole`` that begins at ``start``."""
        length = part.shape[self.dim] // (self.outer * self.inner)
        if self.outer > 1:
            part = part.unflatten(self.dim, (self.outer, length, self.inner))
        self.window(whole, start, length).copy_(part)


@dataclass(frozen=True)
class Output:
    """One output of a loop: how its slices lie in it, its layout, and the dying input it is written over, if any."""

    slice: Slice
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    over: int | None = None

    def allocate(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.over is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        target = inputs[self.over]
        return target.as_strided(self.shape, self.stride, target.storage_offset())


class SlicedLoop(nn.Module):
    """Runs ``bodies[length]`` for each of ``lengths``, which sum to the axis' extent.

    ``inputs`` aligns with the arguments: the ``Slice`` that a body gets of each, or ``None`` for the whole tensor.
    A body returns one tensor for each of ``outputs``.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        inputs: Sequence[Slice | None],
        outputs: Sequence[Output],
        bodies: Mapping[int, fx.GraphModule],
    ) -> None:
        super().__init__()
        self.lengths = tuple(lengths)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.bodies = nn.ModuleDict({str(length): body for length, body in bodies.items()})

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = tuple(output.allocate(tensors) for output in self.outputs)
        start = 0
        for length in self.lengths:
            windows = [
                x if s is None else s.window(x, start, length) for x, s in zip(tensors, self.inputs, strict=True)
            ]
            parts = self.bodies[str(length)](*windows)
            for output, out, part in zip(self.outputs, outs, parts, strict=True):
                output.slice.store(out, start, part)
            del parts, part
            start += length
        return outs

    def with_bodies(self, bodies: Mapping[str, nn.Module]) -> SlicedLoop:
        """The same loop over other bodies, by the names that ``bodies`` has them under."""
        other = copy.copy(self)
        other._modules = {"bodies": nn.ModuleDict(bodies)}
        return other

    def graphs(self) -> Mapping[int, fx.GraphModule]:
        """The bodies, by the length of their slices."""
        return {int(length): body for length, body in self.bodies.items() if isinstance(body, fx.GraphModule)}

    def extra_repr(self) -> str:
        return f"slices={self.lengths}"
