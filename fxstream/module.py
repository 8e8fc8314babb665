"""StreamedModule: stands where the user's module stood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from fxstream.card import memory_errors
from fxstream.compile.regions import Region
from fxstream.errors import CaptureError, GradientError
from fxstream.passes.graph.call import Captured, Inputs
from fxstream.passes.graph.capture import owner, roots_of_call
from fxstream.passes.graph.numbers import NOTHING_TAKEN, Taken, answers, is_leaf, owners_of
from fxstream.passes.graph.parts import TARGET
from fxstream.passes.graph.places import Place, value_at
from fxstream.passes.graph.snapshot import Snapshot, environment
from fxstream.passes.graph.state import State
from fxstream.passes.graph.turns import turn
from fxstream.runtime.autocast import without_autocast
from fxstream.runtime.draws import generators_given

if TYPE_CHECKING:
    from fxstream.planned import Compiled
    from fxstream.report import Plan
    from fxstream.submodules import Submodules

MOST_ALIKE = 4
"""Plans for calls that differ in a Python number alone, after which one more draws a warning."""

Compiler = Callable[[Sequence[Any], Mapping[str, Any], Collection[Place]], "Compiled"]
"""Compiles a call; tensors at some places in the model are inputs of its graph."""

Check = Callable[["Compiled", Sequence[torch.Tensor]], bool]

_SHARED = (
    *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
"""Dictionaries of a module that a streamed one has in common with it."""

_FORWARDED = (
    *("to", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "_apply"),
    *("train", "apply", "requires_grad_", "zero_grad"),
    *("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict"),
)
"""Methods of every module that act on the model itself, which may have its own."""


def always(compiled: Any, tensors: Sequence[torch.Tensor]) -> bool:
    """The check of a plan that what else is held can't break."""
    return True


class _Standing(type):
    """The class of classes that are told from the class of the model that they stand for by identity alone.

    So a streamed component is taken for one of the model's class by what compares ``type(component)``, as diffusers
    does where a pipeline is made of another's components.
    """

    stands_for: type

    def __eq__(cls, other: object) -> bool:
        return cls is other or vars(cls).get("stands_for") is other

    def __hash__(cls) -> int:
        return type.__hash__(vars(cls).get("stands_for", cls))


@cache
def _standing(kind: type, stands_for: type) -> type:
    return _Standing(kind.__name__, (kind,), {"stands_for": stands_for, "__doc__": kind.__doc__})


class StreamedModule(nn.Module, metaclass=_Standing):
    """A module that runs the user's model by a plan, one for each kind of call.

    Parameters, buffers and submodules are the model's own (the same dictionaries), and every other attribute is read
    and set there; to ``isinstance`` it is of the model's class too.

    A call whose shapes, strides, dtypes, devices or Python arguments were not seen before is planned, and the plan kept
    beside the others; so is a call with other values in a tensor that the model makes shapes or numbers of, such as a
    prompt's mask that it drops padding by. So is a call after the model itself has changed: a submodule, a hook, an
    attribute, the dtype or device of a weight. A weight changed in place needs no new plan.

    It can't be copied or pickled: copy the model and optimize the copy.
    """

    def __new__(cls, model: Callable[..., Any], *args: Any, **kwargs: Any) -> StreamedModule:
        kind: Any = type(owner(model)[0])
        made: StreamedModule = object.__new__(_standing(cls, kind))
        return made

    def __init__(
        self,
        model: Callable[..., Any],
        compiler: Compiler,
        region: Region | None = None,
        fits: Check = always,
        submodules: Submodules | None = None,
    ) -> None:
        super().__init__()
        module, function = owner(model)
        self.__dict__["_original"] = module
        self.__dict__[TARGET] = model
        self.__dict__["_function"] = function
        self.__dict__["__module__"] = type(module).__module__
        for name in _SHARED:
            self.__dict__[name] = getattr(module, name)
        self._compiler = compiler
        self._region = region
        # What torch.compile can't have in its graph, it has to leave to Python.
        self._apart = None if region is not None else torch.compiler.disable(StreamedModule.forward)
        self._fits = fits
        self._submodules = submodules
        self._compiled: dict[Any, Compiled] = {}
        self._read: dict[Any, frozenset[int]] = {}
        self._live: frozenset[Place] = frozenset()
        self._asked: frozenset[Place] = frozenset()
        self._outside: dict[Any, frozenset[Place]] = {}
        self._unread: dict[Any, frozenset[Place]] = {}
        self._taken: dict[Any, Taken] = {}
        self._owners: dict[Any, tuple[Snapshot, list[tuple[Any, Any]]]] = {}
        self._states: dict[Any, int] = {}
        self._alike: dict[Any, tuple[int, int]] = {}
        self._see()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The model's class to ``isinstance`` and to what saves a pipeline by its components' classes."""
        return type(self.__dict__["_original"]) if "_original" in self.__dict__ else StreamedModule

    def _get_name(self) -> str:
        return f"Streamed{type(self.__dict__['_original']).__name__}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
            return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is set on a module from outside to wrap its calls ("forward", and names with an underscore) stays here.
        if name.startswith("_") or name == "forward" or "_original" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.__dict__["_original"], name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.__dict__["_original"], name)

    def __dir__(self) -> Iterable[str]:
        return sorted({*dir(StreamedModule), *self.__dict__, *dir(self.__dict__["_original"])})

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.__dict__["_original"].training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_original" in self.__dict__:
            self.__dict__["_original"].training = mode

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans made so far, in the order of their first calls."""
        made = {id(compiled.plan): compiled.plan for compiled in list(self._compiled.values())}
        others = self._submodules.plans if self._submodules is not None else ()
        return (*made.values(), *(self._region.plans if self._region else ()), *others)

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Capture and plan the call with these inputs, unless it was; runs nothing.

        A call that is no single graph is a ``CaptureError``: it has to be run, for its submodules to be planned.
        """
        return self._compiled_for(Inputs.of(args, kwargs), args, kwargs).plan

    def runs_without_graph(self, error: CaptureError) -> bool:
        """Whether a call that is refused so is run by its submodules."""
        return self._submodules is not None and error.data_dependent

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on these inputs.

        Raises ``GradientError`` where autograd would record, and what ``optimize`` raises where the call is planned.
        """
        if torch.compiler.is_dynamo_compiling():
            if self._apart is not None:
                return self._apart(self, *args, **kwargs)
            from fxstream.compile.region import region

            assert self._region is not None
            return region(lambda: self._traced(args, kwargs), token=self._region.token)
        return self._streamed(args, kwargs)

    def _traced(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's own call to Dynamo; where that has broken off, the streamed one."""
        function = self.__dict__["_function"]
        return function(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else self._streamed(args, kwargs)

    def _streamed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        inputs = Inputs.of(args, kwargs)
        if self._submodules is not None and self._submodules.calls and self._call(inputs) in self._submodules.calls:
            return self._submodules.run(args, kwargs)
        try:
            compiled = self._compiled_for(inputs, args, kwargs, inference=not torch.is_grad_enabled())
        except CaptureError as error:
            if not self.runs_without_graph(error):
                raise
            assert self._submodules is not None
            self._submodules.take(self._call(inputs), error)
            return self._submodules.run(args, kwargs)
        captured = compiled.captured
        captured.refuse_aliases(inputs.tensors)
        roots = roots_of_call(self.__dict__[TARGET], args, kwargs) if captured.state else {}
        plain = torch._C.DisableTorchFunctionSubclass() if captured.dressed else nullcontext()
        with torch.no_grad(), without_autocast(), plain, generators_given(inputs.generators):
            tensors = (*inputs.tensors, *captured.state.read(roots), *self._numbers(captured, inputs))
            with memory_errors(compiled):
                found = self._run(compiled, tensors)
            call = self._call(inputs) if captured.state.again else None
            before = self._state(call) if captured.state.again else (0, 0)
            captured.changes(roots, found)
            if captured.state.again:  # what the call leaves needs no plan of its own
                self._alike.setdefault((call, self._present_state(call)), before)
            return captured.result(found)

    def _run(self, compiled: Any, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The tensor leaves of the result, and what follows them."""
        return compiled.run(*tensors)

    def _call(self, inputs: Inputs) -> Any:
        """What tells this kind of call apart, the state of the model aside."""
        told = {}
        if inputs.floats:
            taken = self._taken.get(inputs.key(dict.fromkeys(inputs.floats)), NOTHING_TAKEN).guards
            told = {at: answers(inputs.rest[at], guards) for (_, (_, at)), guards in taken.items()}
        return inputs.key(told), environment()

    def _compiled_for(
        self, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any], inference: bool = True
    ) -> Compiled:
        if not inference:
            self._refuse_gradients(inputs)
        compiled = self._known(inputs)
        if compiled is None:
            with turn():
                return self._planned(inputs, args, kwargs)
        return compiled

    def _known(self, inputs: Inputs) -> Compiled | None:
        """The plan of a call, if there is one that fits."""
        call = self._call(inputs)
        kind = (*call, self._state(call))
        compiled = self._compiled.get((*kind, inputs.values(self._read.get(kind, frozenset()))))
        return compiled if compiled is not None and self._fits(compiled, inputs.tensors) else None

    def _planned(self, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
        """The plan of a call, by the thread whose turn it is: maybe another has made it meanwhile."""
        compiled = self._known(inputs)
        if compiled is None:
            before = self._call(inputs)
            read = self._read.get((*before, self._state(before)), frozenset())
            compiled = self._compiler(args, kwargs, self._live)
            self._take(inputs.key(dict.fromkeys(inputs.floats)), compiled.captured.state, leaves=True)
            call = self._call(inputs)
            self._take(call, compiled.captured.state, leaves=False)
            self._remember(call, compiled.captured.state)
            kind = (*call, self._state(call))
            self._read[kind] = read.union(self._read.get(kind, ()), compiled.captured.read)
            key = (*kind, inputs.values(self._read[kind]))
            if key not in self._compiled:
                self._warn_of_numbers(key)
            self._compiled[key] = compiled
        return compiled

    def _take(self, call: Any, state: State, leaves: bool) -> None:
        """Note which numbers are values of the graphs of a kind of call, so that others of them are the same to it."""
        guards = {place: found for place, found in state.taken.items() if is_leaf(place) == leaves}
        told = (place for place in state.told if is_leaf(place) == leaves)
        self._taken[call] = self._taken.get(call, NOTHING_TAKEN).joined(guards, told)

    def _numbers(self, captured: Captured, inputs: Inputs) -> list[torch.Tensor]:
        """The numbers that a graph takes as values, as they are now."""
        if not captured.state.numbers:
            return []
        owners = self._owners.get(captured.state.numbers)
        if owners is None or owners[0] is not self._snapshot:
            found = owners_of(captured.state.numbers, self._snapshot.roots)
            owners = self._owners[captured.state.numbers] = self._snapshot, found
        values = [inputs.rest[at] if held is None else held[at] for held, at in owners[1]]
        return [torch.tensor(values, dtype=torch.float64)]

    def _remember(self, call: Any, state: State) -> None:
        """Tell states of the model apart by what the graphs so far have shown of it."""
        self._live |= state.live
        asked = frozenset(state.asked) - self._asked
        if asked:
            self._asked |= asked
            self._see()
        self._unread[call] = self._unread.get(call, frozenset()) | state.unread
        places = {place for place in (*state.inputs, *state.changed) if place[0][1] not in ("args", "kwargs")}
        outside = {place for place in places - state.unread if not self._snapshot.has(place)}
        self._outside[call] = self._outside.get(call, frozenset()) | outside
        self._present.clear()

    def _state(self, call: Any) -> tuple[int, int]:
        """The numbers of a state of the model that is to this kind of call as the present one."""
        present = self._present_state(call)
        return self._alike.get((call, present), present)

    def _present_state(self, call: Any) -> tuple[int, int]:
        """The numbers of the model's present state, as far as this kind of call reads it, and of what is outside."""
        if not self._snapshot.holds():
            self._see()
        unread, outside = self._unread.get(call, frozenset()), self._outside.get(call, frozenset())
        taken = self._taken.get(call, NOTHING_TAKEN)
        hidden = unread, taken.hidden
        if hidden not in self._present:
            roots = self._snapshot.roots
            told = [answers(value_at(place, roots), guards) for place, guards in taken.guards.items()]
            self._present[hidden] = self._number((self._snapshot.key(unread | taken.guards.keys(), self._live), *told))
        if not outside:
            return self._present[hidden], 0
        values = {place: value_at(place, self._snapshot.roots) for place in sorted(outside, key=repr)}
        live = {(("root", place),) for place in outside & self._live}
        return self._present[hidden], self._number(Snapshot(values).key(live=live))

    def _see(self) -> None:
        """Look at the model as it is now."""
        self._snapshot = Snapshot(roots_of_call(self.__dict__[TARGET], (), {}), asked=self._asked)
        self._present: dict[Any, int] = {}

    def _number(self, state: Any) -> int:
        return self._states.setdefault(state, len(self._states))

    def _warn_of_numbers(self, key: Any) -> None:
        """Where every step of a loop is planned anew for its number, or for what a tensor holds, say so once."""
        (spec, rest, tensors), *others, _ = key
        alike = [
            known
            for (known_spec, known, known_tensors), *known_others, _ in list(self._compiled)
            if (known_spec, known_tensors, known_others) == (spec, tensors, others)
        ]
        numbers = {leaf for known in alike for leaf, now in zip(known, rest, strict=True) if leaf != now}
        if len(alike) != MOST_ALIKE or not all(kind in (int, float) for kind, _ in numbers):
            return
        what, advice = "a Python number", "Pass that number as a tensor, and one plan serves all its values"
        if not numbers:
            what, advice = "a tensor's values", "The model makes shapes or numbers of them, so each needs its own plan"
        warnings.warn(
            f"a streamed {type(self.__dict__['_original']).__name__} has now planned {MOST_ALIKE + 1} calls that "
            f"differ in {what} alone. {advice}",
            stacklevel=2,
        )

    def _refuse_gradients(self, inputs: Inputs) -> None:
        if any(tensor.requires_grad for tensor in inputs.tensors):
            what = "an input requires a gradient"
        elif any(map(attrgetter("requires_grad"), self._snapshot.weights.values())):
            what = "its parameters require gradients"
        else:
            return
        raise GradientError(
            f"a streamed {type(self.__dict__['_original']).__name__} runs inference only, but autograd is on and "
            f"{what}: call it under torch.no_grad() or torch.inference_mode(), or call requires_grad_(False) first"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce_ex__(4)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"a streamed {type(self.__dict__['_original']).__name__} can't be copied or pickled: its plans belong to "
            "the model that it was made of. Keep the model, and optimize the copy"
        )


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: StreamedModule, *args: Any, **kwargs: Any) -> Any:
        original = self.__dict__["_original"]
        result = getattr(original, name)(*args, **kwargs)
        return self if result is original else result

    method.__name__ = name
    method.__doc__ = f"As the model's own ``{name}``."
    return method


for _name in _FORWARDED:
    setattr(StreamedModule, _name, _forwarded(_name))
