"""The runtime of a sliced loop: a body graph run once a slice, each result stored into a preallocated output.

What is too large for memory lives in files, from which a slice's windows are read and to which its results are written.
This folder imports torch alone: a rewritten graph needs nothing else of fxstream to run.
"""

from __future__ import annotations

import copy
import math
import mmap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from fxstream.runtime.release import give_back
from fxstream.runtime.spill import empty_at_home, write_home


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

    def store(self, whole: torch.Tensor, start: int, part: torch.Tensor, at_home: bool = False) -> None:
        """Write ``part`` as the slice of ``whole`` that begins at ``start``; where that is in a file, to the file."""
        length = part.shape[self.dim] // (self.outer * self.inner)
        if self.outer > 1:
            part = part.unflatten(self.dim, (self.outer, length, self.inner))
        window = self.window(whole, start, length)
        if not (at_home and write_home(window, part)):
            window.copy_(part)


@dataclass(frozen=True)
class Output:
    """One output of a loop: how its slices lie in it, its layout, and the dying input it is written over, if any.

    An input whose strides are not ``over_stride`` after all is left alone. With a ``home`` the output is in a file in
    that folder, "" where temporary ones are.
    """

    slice: Slice
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    over: int | None = None
    over_stride: tuple[int, ...] | None = None
    home: str | None = None

    def allocate(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        target = None if self.over is None else inputs[self.over]
        if target is None or not _lies_as(target, self.over_stride):
            if self.home is not None:
                return empty_at_home(self.shape, self.stride, self.dtype, self.home)
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return target.as_strided(self.shape, self.stride, target.storage_offset())


@dataclass(frozen=True)
class Stretches:
    """How a window lies in ``whole`` bytes: ``count`` stretches of ``step`` bytes for each step of an axis."""

    count: int
    step: float
    whole: int

    @staticmethod
    def of(tensor: torch.Tensor, axis: Slice, extent: int) -> Stretches:
        """Those of a tensor, where the axis has ``extent`` steps."""
        stride = tensor.stride(axis.dim)
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        count = math.prod(size for size, step in sizes if step > stride) * axis.outer
        step = axis.inner * stride * tensor.element_size() * axis.extent / extent
        return Stretches(count, step, int(tensor.untyped_storage().nbytes()))

    def bytes_in_pages(self, length: float) -> int:
        """Bytes of the pages that hold a window of that many steps."""
        return min(self.whole, self.count * (math.ceil(self.step * length / mmap.PAGESIZE) + 1) * mmap.PAGESIZE)


def _pages_of(tensor: torch.Tensor, axis: Slice | None, window: tuple[int, int] | None) -> int:
    """Bytes of the pages that hold a window of a tensor."""
    if axis is None or window is None:
        return int(tensor.untyped_storage().nbytes())
    return Stretches.of(tensor, axis, axis.extent).bytes_in_pages(window[1])


def _lies_as(tensor: torch.Tensor, stride: Sequence[int] | None) -> bool:
    """Whether a tensor has these strides, where they matter: not in a dimension of size one."""
    if stride is None:
        return True
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), stride, strict=True))


@dataclass(frozen=True, slots=True)
class Step:
    """One slice of a loop: ``length`` steps of the axis, computed by the body of that name.

    ``reads`` aligns with the inputs: (start, length) of the window that the body gets, None for the whole tensor.
    ``writes`` aligns with the outputs: where in each of them the slice begins.
    """

    length: int
    body: str
    reads: tuple[tuple[int, int] | None, ...]
    writes: tuple[int, ...]


class SlicedLoop(nn.Module):
    """Runs, for each of ``steps`` in turn, its body on windows of the inputs, and stores what that returns.

    ``inputs`` aligns with the arguments: how the axis lies in each, or ``None`` where bodies get the whole tensor.
    A body returns one tensor for each of ``outputs``. Slices that differ in no shape have a body in common. The inputs
    at the positions ``at_home`` are in files.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[Slice | None],
        outputs: Sequence[Output],
        bodies: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.at_home: frozenset[int] = frozenset()
        self.steps = tuple(steps)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.bodies = nn.ModuleDict(bodies)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As ``forward``: hooks of all modules are for the user's."""
        return self.forward(*tensors)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of the axis in each slice."""
        return tuple(step.length for step in self.steps)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = tuple(output.allocate(tensors) for output in self.outputs)
        mapped = [tensors[position] for position in self.at_home]
        mapped += [out for output, out in zip(self.outputs, outs, strict=True) if output.home is not None]
        at_home = [output.home is not None or output.over in self.at_home for output in self.outputs]
        for step in self.steps:
            windows = [
                x if s is None or read is None else s.window(x, *read)
                for x, s, read in zip(tensors, self.inputs, step.reads, strict=True)
            ]
            parts = self.bodies[step.body].forward(*windows)
            for output, out, start, part, home in zip(self.outputs, outs, step.writes, parts, at_home, strict=True):
                output.slice.store(out, start, part, home)
            del parts, part
            for tensor in mapped:
                give_back(tensor)
        return outs

    def with_homes(self, inputs: Collection[int], outputs: Collection[int], folder: str) -> SlicedLoop:
        """The same loop with the inputs and outputs at these positions in files, those of outputs in ``folder``."""
        other = copy.copy(self)
        other.at_home = frozenset(inputs)
        other.outputs = tuple(
            replace(output, home=folder if position in outputs else None)
            for position, output in enumerate(self.outputs)
        )
        return other

    @property
    def moves(self) -> bool:
        """Whether some of its inputs or outputs are in files."""
        return bool(self.at_home) or any(output.home is not None for output in self.outputs)

    def bytes_mapped(self, step: Step, tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> int:
        """Bytes of files that one slice has in memory: those of its windows, of these inputs and outputs, in pages."""
        read = sum(_pages_of(tensors[at], self.inputs[at], step.reads[at]) for at in self.at_home)
        homes = ((at, output) for at, output in enumerate(self.outputs) if output.home is not None)
        written = (_pages_of(outs[at], out.slice, (step.writes[at], step.length)) for at, out in homes)
        return read + sum(written)

    def bytes_moved(self, tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> int:
        """Bytes that all slices read from files and write to files."""
        moved = sum(outs[at].nbytes for at, output in enumerate(self.outputs) if output.home is not None)
        for step in self.steps:
            for at in self.at_home:
                axis, read = self.inputs[at], step.reads[at]
                share = 1.0 if axis is None or read is None else read[1] / axis.extent
                moved += int(tensors[at].nbytes * share)
        return moved

    def with_bodies(self, bodies: Mapping[str, nn.Module]) -> SlicedLoop:
        """The same loop over other bodies, by the names that ``bodies`` has them under."""
        other = copy.copy(self)
        other._modules = {"bodies": nn.ModuleDict(bodies)}
        return other

    def graphs(self) -> Mapping[str, fx.GraphModule]:
        """The bodies that are graphs, by name."""
        return {name: body for name, body in self.bodies.items() if isinstance(body, fx.GraphModule)}

    def extra_repr(self) -> str:
        return f"slices={self.lengths}"
