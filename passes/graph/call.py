"""Calls: the inputs of one, and what a capture of it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.passes.graph.snapshot import key_of
from fxstream.passes.graph.state import NO_STATE, State, taken_apart
from fxstream.passes.graph.structure import TENSOR, unflatten


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
        return Inputs((), self.rest, self.spec)

    def key(self) -> Any:
        """A value that is equal for calls that one plan serves.

        Raises ``ValueError`` for an argument that can't be compared.
        """
        tensors = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in self.tensors)
        try:
            rest = tuple((type(leaf), None if leaf is TENSOR else key_of(leaf)) for leaf in self.rest)
        except TypeError as error:
            raise ValueError(
                f"arguments of type {error} can't be told apart between calls: pass tensors, numbers, strings, "
                "containers or plain objects"
            ) from None
        return self.spec, rest, tensors

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
    ``read`` have the values that they had. What follows the result's tensors is for ``state.write``.
    """

    graph_module: fx.GraphModule
    inputs: Inputs
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec
    read: tuple[int, ...] = ()
    state: State = NO_STATE

    def result(self, tensors: Sequence[torch.Tensor]) -> Any:
        return unflatten(tensors, self.rest, self.spec)

    def changes(self, roots: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Set in the model, and in the caller's containers, what the call sets there."""
        if self.state.effects:
            self.state.write(roots, tensors[sum(leaf is TENSOR for leaf in self.rest) :])
