"""Known values: what small inputs of whole numbers and masks hold, followed beside a capture.

Some models make shapes of values: they drop the padded tokens of a prompt by its mask, or cut a batch by its lengths.
``torch.export`` knows no values, so such inputs are followed here through every function that is given them alone, and
where the model asks, it gets its answer. A graph so made serves calls with the same values, and ``read`` says of which
inputs. Masks are given in any type: zeros and ones in two dimensions or more; so are the zeros of an image that is not
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fxstream.passes.graph.effects import target_draws

MOST = 2 << 20
"""Bytes of the largest tensor that is followed."""

WRITTEN = "is mutated in the forward method"
"""In torch.export's error for a write to a tensor that is no input, weight or buffer, and in ours."""

ASKING: set[Callable[..., Any]] = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, torch.equal, Tensor.equal),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__),
}
"""Functions that make Python's own values of a tensor's."""

SHAPING: set[Callable[..., Any]] = {
    *(torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere),
    *(torch.masked_select, Tensor.masked_select),
    *(torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive),
}
"""Functions whose results have a shape that depends on values."""

REPEATING = {torch.repeat_interleave, Tensor.repeat_interleave}

MAKING: set[Callable[..., Any]] = {torch.arange, torch.full, torch.ones, torch.tensor, torch.zeros}
"""Functions that make a tensor of numbers alone, always the same."""


class KnownValues(TorchFunctionMode):
    """Follows the values of a call's inputs, and of constants that a model keeps, while it is traced.

    ``follow`` tells which traced tensors stand for the inputs, and then for the constants; ``read`` are the positions
    among all these of those that were asked.
    """

    def __init__(self, inputs: Sequence[Tensor], constants: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._count = len(inputs)
        self._inputs = {index: x.detach().cpu() for index, x in enumerate(inputs) if _is_followed(x)}
        kept = ((index, x) for index, x in enumerate(constants, start=len(inputs)) if _is_small(x))
        self._inputs.update((index, x.detach().cpu()) for index, x in kept)
        self._known: dict[int, tuple[Tensor, Tensor, frozenset[int]]] = {}

    def follow(self, traced: Sequence[Tensor]) -> None:
        """Tie the inputs as they are traced, all of them in order, to their values."""
        self._known.clear()
        self._kept = {id(tensor) for tensor in traced[self._count :]}
        for index, value in self._inputs.items():
            with out_of_sight():  # a copy, which the model may write to, of the same layout
                layout = value.storage_offset(), value.shape, value.stride()
                copy = value.new_empty(0).set_(value.untyped_storage().clone(), *layout)
            self._tie(traced[index], copy, frozenset([index]))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._functorch.peek_interpreter_stack() is not None:  # inside vmap a tensor stands for many
            return function(*args, **kwargs)
        written = [*args[:1], kwargs.get("out")] if _writes(function, kwargs) else []
        if any(id(tensor) in self._kept for tensor in pytree.tree_leaves(written)):
            raise RuntimeError(f"a constant {WRITTEN}")  # torch.export may write to it for real before it says so
        if function is Tensor.__iter__ and id(args[0]) in self._known:
            return iter(self.__torch_function__(torch.unbind, types, args))
        if function is Tensor.__getitem__ or (function is Tensor.__setitem__ and _is_picked(*args)):
            args = (args[0], self._by_positions(args[1]), *args[2:])
        elif function in REPEATING and len(args) > 1:
            function, args, kwargs = self._by_repeated_positions(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(id(tensor) in self._known for tensor in tensors) and (bool(tensors) or function in MAKING)
        if known and tensors and function in ASKING | SHAPING:
            sources = self._sources(tensors)
            value = self._value(function, args, kwargs)
            if function in SHAPING:
                return self._constants(value, tensors[0].device, sources)
            self.read |= sources
            return value
        result = function(*args, **kwargs)
        followed = known and self._followed(function, args, kwargs, self._sources(tensors), result)
        for traced, value, sources in self._in_storages_of(written):
            if followed:
                self._tie(traced, value, sources | self._sources(tensors))
            else:
                del self._known[id(traced)]
        return result

    def _followed(self, function: Any, args: Any, kwargs: Any, sources: frozenset[int], result: Any) -> bool:
        """Do to the values what was done to the traced; whether that could be done."""
        made = [leaf for leaf in pytree.tree_leaves(result) if leaf is not None]
        if any(not isinstance(leaf, Tensor) or leaf.nbytes > MOST for leaf in made):
            return False
        try:
            value = self._value(function, args, kwargs)
        except Exception:
            return False
        for leaf, known in zip(made, (v for v in pytree.tree_leaves(value) if v is not None), strict=True):
            self._tie(leaf, known, sources)
        return True

    def _tie(self, traced: Tensor, value: Tensor, sources: frozenset[int]) -> None:
        self._known[id(traced)] = traced, value, sources  # kept, lest a later tensor has its id

    def _sources(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        return frozenset().union(*(self._known[id(tensor)][2] for tensor in tensors))

    def _value(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What a function makes of the values."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: self._known[id(tensor)][1], (args, kwargs))
        with out_of_sight(), _NoDraws():
            return pytree.tree_map_only(Tensor, Tensor.cpu, function(*args, **kwargs))

    def _constants(self, values: Any, device: torch.device, sources: frozenset[int]) -> Any:
        """Values as the traced graph's constants, by which their sources are read."""
        self.read |= sources

        def constant(value: Tensor) -> Tensor:
            with out_of_sight():
                numbers = value.tolist()
            made = torch.tensor(numbers, dtype=value.dtype, device=device).reshape(value.shape)
            self._tie(made, value, sources)
            return made

        return pytree.tree_map_only(Tensor, constant, values)

    def _by_positions(self, index: Any) -> Any:
        """An index with the positions of what is true for each mask that is known, and known bounds as numbers."""
        positions: list[Any] = []
        for entry in index if isinstance(index, tuple) else (index,):
            if isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.dim() and id(entry) in self._known:
                _, value, sources = self._known[id(entry)]
                with out_of_sight():
                    where = value.nonzero(as_tuple=True)
                positions.extend(self._constants(where, entry.device, sources))
            elif isinstance(entry, slice):
                positions.append(slice(*map(self._number, (entry.start, entry.stop, entry.step))))
            else:
                positions.append(entry)
        return tuple(positions) if isinstance(index, tuple) or len(positions) != 1 else positions[0]

    def _number(self, bound: Any) -> Any:
        """A slice's bound, as a number where it is a tensor that is known."""
        return self.__torch_function__(Tensor.__index__, (), (bound,)) if id(bound) in self._known else bound

    def _by_repeated_positions(self, input: Tensor, repeats: Any, dim: int | None = None, **rest: Any) -> Any:
        """A repetition, as a function and its arguments: by positions where it is known how often each is repeated."""
        if id(repeats) not in self._known:
            return torch.repeat_interleave, (input, repeats, dim), rest
        _, value, sources = self._known[id(repeats)]
        input, dim = (input.flatten(), 0) if dim is None else (input, dim)
        with out_of_sight():
            positions = torch.repeat_interleave(value.expand(input.shape[dim]))
        return torch.index_select, (input, dim, self._constants(positions, repeats.device, sources)), {}

    def _in_storages_of(self, tensors: Sequence[Any]) -> list[tuple[Tensor, Tensor, frozenset[int]]]:
        """All that is known of tensors that share a storage with one of these."""
        written = [self._known[id(tensor)][1] for tensor in tensors if id(tensor) in self._known]
        if not written:
            return []
        with out_of_sight():
            storages = set(map(_storage, written))
            return [known for known in self._known.values() if _storage(known[1]) in storages]


@contextmanager
def out_of_sight() -> Iterator[None]:
    """Compute for real, unseen by whoever traces."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class _NoDraws(TorchDispatchMode):
    """Raises where random numbers would be drawn: those of a trace are not those of a call."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if target_draws(function, args, kwargs or {}):
            raise RuntimeError(f"{function} draws")
        return function(*args, **(kwargs or {}))


def _is_followed(tensor: Tensor) -> bool:
    return _is_small(tensor) and (not tensor.is_floating_point() or _is_mask(tensor))


def _is_small(tensor: Tensor) -> bool:
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.is_complex():
        return False
    return type(tensor) in (Tensor, Parameter) and tensor.untyped_storage().nbytes() <= MOST


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and bool(((tensor == 0) | (tensor == 1)).all())


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _is_picked(target: Tensor, index: Any, value: Any) -> bool:
    """Whether what is assigned to an index may have a dimension as long as what the index picks."""
    picked = index.dim() if isinstance(index, Tensor) else target.dim()
    return isinstance(value, Tensor) and value.dim() > target.dim() - picked


def _writes(function: Any, kwargs: Any) -> bool:
    """Whether a function writes to its first argument, or to ``out``, as far as its name tells."""
    name = getattr(function, "__name__", "")
    special = name.startswith("__")
    return (name.startswith(("__i", "__set")) if special else name.endswith("_")) or kwargs.get("out") is not None
