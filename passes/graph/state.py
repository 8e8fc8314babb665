"""State: what a call changes beside its result, found by tracing it, and written back after each call.

A graph knows tensors alone. What a forward sets in attributes, containers, objects and globals is found by snapshots
before and after it; tensors among that become outputs of the graph. Where a call changes something it is traced once
more, from the state that it leaves: where that is a state as before, or of the same graph, the changes can be written
back after every call, and the graph is right in the next call, too. Where it is not, the model is refused.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.passes.graph.parts import POSITION
from fxstream.passes.graph.places import Place, describe, put, value_at
from fxstream.passes.graph.snapshot import Change, Snapshot
from fxstream.passes.graph.structure import Flattened, Made, flatten, unflatten

MOST_SHOWN = 80
"""Characters of a value in an error."""


@dataclass(frozen=True)
class Effect:
    """A value that a call sets at a place, or, with ``more``, values that it adds to a list there.

    ``value`` has the tensors of the trace; ``layout`` is equal for values that differ in what their tensors hold alone.
    ``replaces`` tells whether there were tensors before, ``shown`` what was there and what is now.
    """

    place: Place
    more: bool
    value: Flattened
    replaces: bool
    shown: tuple[str, str]
    layout: Any = None

    @staticmethod
    def of(change: Change, before: Snapshot) -> Effect:
        """A change as the graph knows it; ``before`` is from before the forward. Refuses what can't be set again."""
        where = describe(change.place)
        if change.place[-1] == POSITION:
            raise CaptureError(f"forward advances the iterator {where}, which nothing can take back: make a list of it")
        if change.place[-2:-1] == (("attribute", "_parameters"),):
            raise CaptureError(
                f"forward sets the parameter {where}: make it before the call, as a parameter or a buffer"
            )
        value = taken_apart(change.after, f"what forward keeps in {where}", before)
        shown = _shown(change.before), _shown(change.after)
        return Effect(change.place, change.more, value, bool(flatten(change.before).tensors), shown)


@dataclass(frozen=True)
class Assumed:
    """A value that is put at some places before a trace; its tensors are inputs of the trace, unless they are fixed."""

    places: tuple[Place, ...]
    more: bool
    value: Flattened
    fixed: bool = False

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return () if self.fixed else self.value.tensors


@dataclass(frozen=True)
class State:
    """What of a model's state a captured graph reads and writes.

    ``inputs`` are the places of the tensors that it takes after the call's own, whose values may be others at each
    call. ``effects`` are what is set after a call, with the tensors that follow the result's. What is computed does not
    depend on what is at the places ``unread``. With ``again`` the graph is right in the state that a call leaves, too.
    ``asked`` are the places of tensors whose values the graph was made for, ``live`` those of tensors that go by
    their layout, as each call sets others. ``numbers`` are the places of the floats whose values are the elements of
    one more input; ``taken`` tells for which floats any will do that answers alike to its guards, ``told`` are those of
    which none will do but the same, and ``counted`` the places of those that a call sets, from the last outputs.
    """

    inputs: tuple[Place, ...] = ()
    effects: tuple[Effect, ...] = ()
    unread: frozenset[Place] = frozenset()
    live: frozenset[Place] = frozenset()
    again: bool = False
    asked: tuple[Place, ...] = ()
    numbers: tuple[Place, ...] = ()
    taken: Mapping[Place, frozenset[Any]] = field(default_factory=dict)
    told: frozenset[Place] = frozenset()
    counted: tuple[Place, ...] = ()

    @staticmethod
    def of(
        assumed: Sequence[Assumed], effects: Sequence[Effect], values: Sequence[torch.Tensor], asked: tuple[Place, ...]
    ) -> State:
        """The state of a trace with these effects, whose tensors have the layouts of the fake ``values``."""
        given, laid_out = iter(values), []
        for effect in effects:
            value = effect.value._replace(tensors=tuple(next(given) for _ in effect.value.tensors))
            laid_out.append(replace(effect, value=value, layout=layout_of(unflatten(*value))))
        return State(tuple(each.places[0] for each in assumed if each.inputs), tuple(laid_out), asked=asked)

    def read(self, roots: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors that the graph takes, as they are now."""
        return [tensor for place in self.inputs for tensor in flatten(value_at(place, roots)).tensors]

    def write(self, roots: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Set what the call sets."""
        given = iter(tensors)
        for effect in self.effects:
            value = effect.value._replace(tensors=tuple(next(given) for _ in effect.value.tensors))
            put(effect.place, roots, unflatten(*value), effect.more)
        for place in self.counted:
            put(place, roots, next(given).item())

    @property
    def count(self) -> int:
        """How many outputs of the graph are for effects."""
        return sum(len(effect.value.tensors) for effect in self.effects) + len(self.counted)

    def refuse_tensors(self, what: str) -> None:
        """Raise ``CaptureError`` where the call keeps tensors, or reads such as others may be."""
        places = [*self.inputs, *(effect.place for effect in self.effects if effect.value.tensors)]
        if places:
            raise CaptureError(
                f"forward keeps tensors in {describe(places[0])}, which {what} can't do in the steps that are skipped"
            )

    def __bool__(self) -> bool:
        return bool(self.inputs or self.effects or self.numbers)

    @property
    def changed(self) -> frozenset[Place]:
        return frozenset(effect.place for effect in self.effects)


NO_STATE = State()


def taken_apart(value: Any, what: str, before: Snapshot | None = None) -> Flattened:
    """A value's tensors, and how it is put together of others; refused where not all of them can be told.

    ``before`` is what there was before a forward made it.
    """
    try:
        found = flatten(value)
    except RecursionError:
        raise CaptureError(f"{what} holds itself: leave that out of it") from None
    for leaf in found.rest:
        if isinstance(leaf, (Iterator, KeysView, ValuesView, ItemsView)):
            raise CaptureError(f"{what} is or holds a {type(leaf).__name__}: make a list or a tuple of it")
    if before is None:
        return found
    given = {id(tensor) for name in ("args", "kwargs") for tensor in flatten(before.roots[name]).tensors}
    known = before.tensors.keys() - given
    if any(isinstance(x, torch.nn.Parameter) and id(x) not in known for x in found.tensors):
        raise CaptureError(f"{what} is or holds a parameter that forward makes: return a tensor, or make it before")
    for leaf in found.rest:
        if Snapshot({"value": leaf}).tensors.keys() - known:
            raise CaptureError(
                f"{what} is or holds a {type(leaf).__name__} with tensors that can't be told from outside: "
                "use lists, tuples, dictionaries, dataclasses or plain objects"
            )
    return found._replace(rest=tuple(_made(leaf, before) for leaf in found.rest))


def _made(leaf: Any, before: Snapshot) -> Any:
    """A leaf of a result: one that forward made, and that may be written, is made anew for each call."""
    found = Snapshot({"value": leaf}).nodes
    if not found or id(leaf) in before.nodes or isinstance(leaf, (torch.nn.Module, type, FunctionType)):
        return leaf
    return Made(leaf)


def assume(assumed: Sequence[Assumed], roots: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> None:
    """Put what is assumed in its places, with these tensors."""
    given = iter(tensors)
    for each in assumed:
        tensors = each.value.tensors if each.fixed else [next(given) for _ in each.inputs]
        value = unflatten(tensors, each.value.rest, each.value.spec)
        for place in each.places:
            put(place, roots, value, each.more)


def layout_of(value: Any) -> Any:
    place = (("root", "value"),)
    return Snapshot({"value": value}).key(live=[place])


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {tuple(value.shape)}"
    text = repr(pytree.tree_map_only(torch.Tensor, _Described, value))
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class _Described:
    """A tensor among others, in an error."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.text = _shown(tensor)

    def __repr__(self) -> str:
        return f"<{self.text}>"
