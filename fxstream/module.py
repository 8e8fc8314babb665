"""StreamedModule: stands where the user's module stood."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from fxstream.compile.regions import Region
from fxstream.errors import GradientError
from fxstream.passes.graph.capture import TARGET, Inputs, owner
from fxstream.passes.graph.turns import turn
from fxstream.runtime.autocast import autocast_dtype, without_autocast
from fxstream.runtime.draws import generators_given

if TYPE_CHECKING:
    from fxstream.planned import Compiled
    from fxstream.report import Plan

MOST_ALIKE = 4
"""Plans for calls that differ in a Python number alone, after which one more draws a warning."""

Compiler = Callable[[Sequence[Any], Mapping[str, Any]], "Compiled"]
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


class StreamedModule(nn.Module):
    """A module that runs the user's model by a plan, one for each kind of call.

    Parameters, buffers and submodules are the model's own (the same dictionaries), and every other attribute is read
    and set there; to ``isinstance`` it is of the model's class too.

    A call whose shapes, strides, dtypes, devices or Python arguments were not seen before is planned, and the plan kept
    beside the others; so is a call with other values in a tensor that the model makes shapes or numbers of, such as a
    prompt's mask that it drops padding by. So is a call after the model itself has changed: a submodule, a hook, an
    attribute, the dtype or device of a weight. A weight changed in place needs no new plan.

    It can't be copied or pickled: copy the model and optimize the copy.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        compiler: Compiler,
        region: Region | None = None,
        fits: Check = always,
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
        self._fits = fits
        self._compiled: dict[Any, Compiled] = {}
        self._read: dict[Any, frozenset[int]] = {}
        self._configuration = Configuration(module)
        self._configurations: dict[Any, int] = {}

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
        made = [compiled.plan for compiled in list(self._compiled.values())]
        return (*made, *(self._region.plans if self._region else ()))

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Capture and plan the call with these inputs, unless it was; runs nothing."""
        return self._compiled_for(Inputs.of(args, kwargs), args, kwargs).plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on these inputs.

        Raises ``GradientError`` where autograd would record, and what ``optimize`` raises where the call is planned.
        """
        if torch.compiler.is_dynamo_compiling() and self._region is not None:
            from fxstream.compile.region import region

            function = self.__dict__["_function"]
            return region(lambda: function(*args, **kwargs), token=self._region.token)
        inputs = Inputs.of(args, kwargs)
        compiled = self._compiled_for(inputs, args, kwargs, inference=not torch.is_grad_enabled())
        compiled.captured.refuse_aliases(inputs.tensors)
        with torch.no_grad(), without_autocast(inputs.tensors), generators_given(inputs.generators):
            return compiled.captured.result(self._run(compiled, inputs.tensors))

    def _run(self, compiled: Any, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The tensor leaves of the result."""
        return compiled.run(*tensors)

    def _compiled_for(
        self, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any], inference: bool = True
    ) -> Compiled:
        state = self._state()
        if not inference:
            self._refuse_gradients(inputs)
        devices = {tensor.device.type for tensor in inputs.tensors}
        kind = (inputs.key(), state, *(autocast_dtype(device) for device in sorted(devices)))
        read = self._read.get(kind, frozenset())
        key = (*kind, inputs.values(read))
        compiled = self._compiled.get(key)
        if compiled is None or not self._fits(compiled, inputs.tensors):
            with turn():
                return self._planned(inputs, args, kwargs, kind)
        return compiled

    def _planned(self, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any], kind: Any) -> Compiled:
        """The plan of a call, by the thread whose turn it is: maybe another has made it meanwhile."""
        key = (*kind, inputs.values(self._read.get(kind, frozenset())))
        compiled = self._compiled.get(key)
        if compiled is None or not self._fits(compiled, inputs.tensors):
            compiled = self._compiler(args, kwargs)
            self._read[kind] = self._read.get(kind, frozenset()).union(compiled.captured.read)
            key = (*kind, inputs.values(self._read[kind]))
            if key not in self._compiled:
                self._warn_of_numbers(key)
            self._compiled[key] = compiled
        return compiled

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

    def _state(self) -> int:
        """The number of the model's present configuration, among those seen."""
        if not self._configurations or not self._configuration.holds():
            self._configuration = Configuration(self.__dict__["_original"])
            key = self._configuration.key()
            self._current = self._configurations.setdefault(key, len(self._configurations))
        return self._current

    def _refuse_gradients(self, inputs: Inputs) -> None:
        if any(tensor.requires_grad for tensor in inputs.tensors):
            what = "an input requires a gradient"
        elif any(map(attrgetter("requires_grad"), self._configuration.weights)):
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


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (dict, OrderedDict, list, set)
_INTERNAL = {*vars(nn.Module())}
_IGNORED = _INTERNAL - {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}


class Configuration:
    """What of a model its captured graph depends on, the values of its weights apart.

    That is: its modules, their attributes and forward hooks, the shape, dtype and device of each weight. An attribute
    that is no number, string or container of such counts as changed where it is another object.

    ``holds`` is asked at every call of a model that may have thousands of modules, so it compares flat lists, whose
    elements are nearly always the same objects, and builds no key.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = [vars(sub) for sub in module.modules()]
        containers = [
            value
            for values in self._attributes
            for name, value in values.items()
            if type(value) in _CONTAINERS and name not in _IGNORED
        ]
        self._empty = [container for container in containers if not container]
        self._dicts = [container for container in containers if container and isinstance(container, dict)]
        self._others = [container for container in containers if container and not isinstance(container, dict)]
        self.weights = [
            weight
            for values in self._attributes
            for weight in chain(values["_parameters"].values(), values["_buffers"].values())
            if weight is not None
        ]
        self._seen = self._look()

    def _look(self) -> tuple[Any, ...]:
        return (
            list(chain.from_iterable(map(dict.values, self._attributes))),
            list(chain.from_iterable(self._dicts)),
            list(chain.from_iterable(map(dict.values, self._dicts))),
            list(chain.from_iterable(self._others)),
            list(map(_PLACE, self.weights)),
        )

    def holds(self) -> bool:
        """Whether the model is as it was when this was made. May say no where it is."""
        try:
            return not any(self._empty) and self._look() == self._seen
        except Exception:  # a tensor that was replaced can't be compared
            return False

    def key(self) -> Any:
        """A value that is equal for configurations that one plan serves."""
        ties: dict[int, int] = {}
        return tuple(
            (name, type(sub), sub.training, _attributes_key(sub), _weights_key(sub, ties))
            for name, sub in self.module.named_modules(remove_duplicate=False)
        )


_PLACE = attrgetter("dtype", "device")


def _attributes_key(module: nn.Module) -> Any:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    attributes = ((name, _frozen(value)) for name, value in vars(module).items() if name not in _INTERNAL)
    return (*map(_Same, hooks), *attributes)


def _weights_key(module: nn.Module, ties: dict[int, int]) -> Any:
    """Name and layout of each weight, and a number that tells which are one."""
    return tuple(
        (
            name,
            tuple(weight.shape),
            weight.stride(),
            weight.dtype,
            weight.device,
            ties.setdefault(id(weight), len(ties)),
        )
        for name, weight in chain(module._parameters.items(), module._buffers.items())
        if weight is not None
    )


def _frozen(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return type(value), tuple((_frozen(name), _frozen(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_frozen, value))
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_frozen, value))
    return _Same(value)


class _Same:
    """Equal to another of the same object alone, which it keeps alive, so that no later one takes its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
