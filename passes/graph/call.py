"""Calls: the inputs of one, and what a capture of it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Generator, fx
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.passes.graph.aliases import overlaps, refuse_written
from fxstream.passes.graph.snapshot import key_of
from fxstream.passes.graph.state import NO_STATE, State, taken_apart
from fxstream.passes.graph.structure import TENSOR, unflatten

ROOT = "model"
"""Name under which a captured graph holds the user's module."""

_GENERATOR = object()
"""Stands for a generator, which no plan keeps."""


def input_name(index: int) -> str:
    """How errors call one of a call's tensors."""
    return f"input tensor {index}"


@dataclass(frozen=True)
class Inputs:
    """One call's inputs: tensor leaves apart from the rest.

    ``spec`` and ``rest`` say how the call is put together again; together with the tensors' shapes, dtypes and
    devices they tell one plan from another.
    """

    tensors: tuple[torch.Tensor, ...]
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        inputs = Inputs(*taken_apart((tuple(args), {name: kwargs[name] for name in sorted(kwargs)}), "an argument"))
        for index, x in enumerate(inputs.tensors):
            if x.is_nested or x.layout is not torch.strided:
                kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
                raise CaptureError(f"input tensor {index} is {kind}, which fxstream can't plan for: pass a dense one")
            if x.is_conj() or x.is_neg():
                raise CaptureError(
                    f"input tensor {index} is a view of conjugates or negatives, which fxstream can't plan for: "
                    "pass x.resolve_conj().resolve_neg()"
                )
        return inputs

    @property
    def count(self) -> int:
        """How many tensors the call has."""
        return sum(leaf is TENSOR for leaf in self.rest)

    def without_tensors(self) -> Inputs:
        """How the call is put together, alone: nothing here keeps an example's tensors alive."""
        return Inputs((), tuple(_GENERATOR if isinstance(leaf, Generator) else leaf for leaf in self.rest), self.spec)

    @property
    def generators(self) -> tuple[Generator, ...]:
        """The leaves that are generators of random numbers: a plan serves all of a device."""
        return tuple(leaf for leaf in self.rest if isinstance(leaf, Generator))

    def drawing_from(self, generators: Sequence[Generator]) -> Inputs:
        """The same call with other generators."""
        others = iter(generators)
        return replace(self, rest=tuple(next(others) if isinstance(x, Generator) else x for x in self.rest))

    @property
    def floats(self) -> list[int]:
        """The positions of the leaves that are floats."""
        return [at for at, leaf in enumerate(self.rest) if type(leaf) is float]

    def key(self, taken: Mapping[int, Any] | None = None) -> Any:
        """A value that is equal for calls that one plan serves.

        Of the floats at the positions ``taken`` what is given there has a part in it, and not the value.

        Raises ``ValueError`` for an argument that can't be compared.
        """
        tensors = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in self.tensors)
        taken = taken or {}
        try:
            rest = tuple(
                (type(leaf), taken[at] if at in taken else self._told(leaf)) for at, leaf in enumerate(self.rest)
            )
        except TypeError as error:
            raise ValueError(
                f"arguments of type {error} can't be told apart between calls: pass tensors, numbers, strings, "
                "containers or plain objects"
            ) from None
        return self.spec, rest, (tensors, overlaps(self.tensors))

    def _told(self, leaf: Any) -> Any:
        """What tells a leaf apart: of a generator its device, and the first leaf that is the same one."""
        if isinstance(leaf, Generator):
            return leaf.device, next(at for at, other in enumerate(self.generators) if other is leaf)
        return None if leaf is TENSOR else key_of(leaf)

    def values(self, positions: Iterable[int]) -> tuple[bytes, ...]:
        """What the tensors at these positions hold."""
        tensors = (self.tensors[index].detach().cpu().contiguous() for index in sorted(positions))
        return tuple(tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)

    def call(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with ``tensors`` in place of this call's own."""
        args, kwargs = unflatten(tensors, self.rest, self.spec)
        return args, kwargs


@dataclass
class Captured:
    """A captured call: ``graph_module(*tensors, *state.read(roots))`` gives the tensor leaves of the result.

    ``result`` puts the user's result together from them. It is right for inputs alone whose tensors at the positions
    ``read`` have the values that they had, and where what is ``written`` to shares no memory with another. What follows
    the result's tensors is for ``state.write``. Some of the weights of a ``dressed`` one are of classes of their own,
    and have to be taken for plain memory: what those make of torch's functions is in the graph.
    """

    graph_module: fx.GraphModule
    inputs: Inputs
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec
    read: tuple[int, ...] = ()
    state: State = NO_STATE
    written: tuple[str, ...] = ()
    dressed: bool = False

    def refuse_aliases(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise ``CaptureError`` where an input or a weight that the call writes to lies over another of these."""
        if self.written:
            weights = [str(node.target) for node in self.graph_module.graph.find_nodes(op="get_attr")]
            values = {name: attrgetter(name)(self.graph_module) for name in weights}
            named = {name.removeprefix(f"{ROOT}."): x for name, x in values.items() if isinstance(x, torch.Tensor)}
            named |= {input_name(index): tensor for index, tensor in enumerate(tensors)}
            refuse_written(named, self.written, type(getattr(self.graph_module, ROOT)).__name__)

    def result(self, tensors: Sequence[torch.Tensor]) -> Any:
        return unflatten(tensors, self.rest, self.spec)

    def changes(self, roots: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Set in the model, and in the caller's containers, what the call sets there."""
        if self.state.effects or self.state.counted:
            self.state.write(roots, tensors[sum(leaf is TENSOR for leaf in self.rest) :])
