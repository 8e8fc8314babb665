"""Rehearse a pipeline's call by shapes alone: which component is called with what, and what is held meanwhile.

The pipeline's own code runs, in a copy whose components have weights without memory and answer with zeros of the right
shapes. So a pipeline of any class says itself what its stages are, and nothing of the user's is touched.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fxstream.budget import Resident
from fxstream.errors import CaptureError
from fxstream.live import Live
from fxstream.passes.graph.call import Inputs
from fxstream.passes.graph.casts import casts_traced
from fxstream.passes.graph.liveness import storages_of
from fxstream.passes.graph.snapshot import Snapshot, roots_of
from fxstream.passes.graph.structure import flatten, unflatten
from fxstream.passes.graph.subclasses import dressing, fake_like, weights_of
from fxstream.passes.graph.twin import Twin
from fxstream.passes.machine.absent import let_be_guarded, numbered
from fxstream.pipeline.components import modules_of, stage_name, streamed_methods, weight_bytes
from fxstream.pipeline.offload import Device, offloaded
from fxstream.pipeline.switches import turn_off

_CPU = torch.device("cpu")
_HOOKED = ("_hf_hook", "_old_forward", "forward")
"""What accelerate sets on a module whose calls it wraps."""


@dataclass
class Rehearsed:
    """One kind of call of a component, by ``args`` and ``kwargs`` like those that the pipeline passed.

    ``dtypes`` are those of the component's weights at the time, ``resident`` the most that was held at one of the
    ``calls``. ``answer`` is the result, flat, its tensors fake.
    """

    component: str
    method: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...]
    resident: Resident
    answer: tuple[Any, ...]
    calls: int = 1


def rehearse(pipeline: Any, call: Mapping[str, Any]) -> Rehearsal:
    """Go through one call of a pipeline.

    A prompt and an image that the call needs and ``call`` lacks are made up. Raises ``ValueError`` where the pipeline
    takes no argument of a name, and ``CaptureError`` where its code does not get through.
    """
    failed: list[tuple[Rehearsal, Exception]] = []
    for attempt in _completed(pipeline, call):
        rehearsal = Rehearsal(pipeline)
        try:
            rehearsal.run(attempt)
        except Exception as error:
            failed.append((rehearsal, error))
        else:
            return rehearsal
    _, cause = max(failed, key=lambda pair: len(pair[0].found))
    raise CaptureError(
        f"{type(pipeline).__name__} could not be gone through by shapes alone: {type(cause).__name__}: {cause}\n"
        f"  Pass what its call needs beside sizes: it takes {_not_given(pipeline, call)} too. Or pass no sizes, and "
        "its stages are planned when they are first called."
    ) from cause


def _not_given(pipeline: Any, call: Mapping[str, Any]) -> str:
    """The arguments of a call that were not given and have no value without; those that it has to have come first."""
    parameters = inspect.signature(type(pipeline).__call__).parameters.values()
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    open_ = [each for each in named if each.default in (None, each.empty) and each.name not in ("self", *call)]
    return ", ".join(each.name for each in sorted(open_, key=lambda each: each.default is None)) or "nothing"


def _completed(pipeline: Any, call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """``call`` with what has to be made up; then with what may have to be."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in call:
            if name not in parameters:
                taken = ", ".join(name for name in parameters if name != "self")
                raise ValueError(f"the call of {type(pipeline).__name__} takes no {name!r}; it takes {taken}")
    given = {name: value for name, value in call.items() if name != "generator"}
    made_up = {"prompt": lambda: "", "image": lambda: _image(parameters, call)}
    lacking = [name for name in made_up if name in parameters and name not in call]
    for name in [name for name in lacking if parameters[name].default is inspect.Parameter.empty]:
        given[name] = made_up[name]()
        lacking.remove(name)
    yield dict(given)
    for name in lacking:
        given[name] = made_up[name]()
        yield dict(given)


def _image(parameters: Mapping[str, inspect.Parameter], call: Mapping[str, Any]) -> Any:
    from PIL import Image

    sizes = [call.get(name) or getattr(parameters.get(name), "default", None) for name in ("width", "height")]
    width, height = (size if isinstance(size, int) else 512 for size in sizes)
    return Image.new("RGB", (width, height))


class Rehearsal:
    """A pipeline's double, and what its components are asked for. ``modules`` are their copies, with fake weights."""

    def __init__(self, pipeline: Any) -> None:
        hooks = offloaded(pipeline)
        self.originals = modules_of(pipeline)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        # Where weights come to the device for a call, they are planned there, and the double itself stays on the CPU.
        self._place = numbered(torch.device(pipeline._offload_device)) if hooks else None
        self.modules = fake_copies(self.originals, self.mode, self._place)
        self.found: dict[Any, Rehearsed] = {}
        self._live = Live()
        self._on_device = Device(list(self.modules), hooks)
        weights = [weight for module in self.originals.values() for weight in weights_of(module)]
        fake = any(isinstance(weight, FakeTensor) or weight.is_meta for weight in weights)
        self._device = _CPU if fake or hooks else torch.device(pipeline.device)
        self._double = _double(pipeline, self.modules, self._device)
        for module in self.modules.values():
            turn_off(module)

    def run(self, call: Mapping[str, Any]) -> None:
        """Call the double, its components answering by shapes."""
        devices = [self._device] if self._device.type != "cpu" else []
        with torch.random.fork_rng(devices), self._answering(), self._live:
            self._double(**call)

    def calls(self) -> list[Rehearsed]:
        """The kinds of calls in the order of their first."""
        return list(self.found.values())

    def is_as_called(self, found: Rehearsed) -> bool:
        """Whether the pipeline's own component is as it was called, on the device and in the dtypes."""
        tensors = Inputs.of(found.args, found.kwargs).tensors
        slots = _slots(self.originals[found.component])
        devices = {*(tensor.device for tensor in tensors), *([self._place] if self._place else [])}
        return found.dtypes == tuple(table[name].dtype for table, name in slots) and not any(
            isinstance(table[name], FakeTensor) or devices - {table[name].device} for table, name in slots
        )

    def as_called(self, found: Rehearsed) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The copy of a component, as it was when called so, with the call's arguments as fake tensors."""
        module = self.modules[found.component]
        _cast(module, found.dtypes)
        inputs = Inputs.of(found.args, found.kwargs)
        args, kwargs = inputs.call(self._fake(inputs.tensors, module))
        return module, args, kwargs

    @contextmanager
    def _answering(self) -> Iterator[None]:
        patched = []
        for name, module in self.modules.items():
            for method in streamed_methods(module) or ("forward",):
                vars(module)[method] = self._stand_in(name, method, getattr(module, method))
                patched.append((module, method))
        try:
            yield
        finally:
            for module, method in patched:
                del vars(module)[method]

    def _stand_in(self, name: str, method: str, function: Callable[..., Any]) -> Callable[..., Any]:
        module = self.modules[name]

        @functools.wraps(function)
        def answer(*args: Any, **kwargs: Any) -> Any:
            self._on_device.enters(name)
            inputs = Inputs.of(args, kwargs)
            dtypes = tuple(slot[key].dtype for slot, key in _slots(module))
            key = name, method, dtypes, _key(inputs)
            mine = {storage for tensor in inputs.tensors for storage, _ in storages_of(tensor)}
            there = {component: self.modules[component] for component in self._on_device.there}
            resident = Resident(stage_name(name, method), weight_bytes(there), self._live.bytes(apart=mine))
            found = self.found.get(key)
            if found is None:
                with _disable_current_modes():
                    shapes = self._shapes(name, method, function, inputs)
                    # Others in the place of the pipeline's own tensors, lest these be kept alive and counted.
                    args, kwargs = inputs.call([_alike(tensor, tensor.device) for tensor in inputs.tensors])
                found = self.found[key] = Rehearsed(name, method, args, kwargs, dtypes, resident, shapes)
            else:
                found.calls += 1
                found.resident = max(found.resident, resident, key=lambda held: held.bytes)
            tensors, rest, spec = found.answer
            return unflatten([_zeros(tensor, self._device) for tensor in tensors], rest, spec)

        return answer

    def _shapes(self, name: str, method: str, function: Callable[..., Any], inputs: Inputs) -> tuple[Any, ...]:
        """The result of a component's call, flat, its tensors fake."""
        module, original = self.modules[name], self.originals[name]
        before = Snapshot(roots_of(original))
        try:
            args, kwargs = inputs.call(self._fake(inputs.tensors, module))
            with self.mode, torch.no_grad(), dressing(), casts_traced():
                return flatten(function(*args, **kwargs))
        except Exception:
            weights = weights_of(original)
            if streamed_methods(original) or any(isinstance(x, FakeTensor) or x.is_meta for x in weights):
                raise
            # What reads values, as a filter of pictures does, is asked itself; it is no stage, and runs once.
            device = weights[0].device if weights else self._device
            args, kwargs = inputs.call([tensor.to(device) for tensor in inputs.tensors])
            with torch.no_grad():
                return flatten(getattr(original, method)(*args, **kwargs))
        finally:
            before.rewind()

    def _fake(self, tensors: Sequence[torch.Tensor], module: nn.Module) -> list[torch.Tensor]:
        """Tensors like these where the module's weights are."""
        device = next((weight.device for weight in weights_of(module)), self._device)
        with self.mode:
            return [_alike(tensor, device) for tensor in tensors]


def fake_copies(
    modules: Mapping[str, nn.Module], mode: FakeTensorMode, place: torch.device | None = None
) -> dict[str, nn.Module]:
    """Copies of modules with fake weights, as if no offloading hook had been there. Nothing is allocated.

    With a ``place`` they are on that device, which need not be there. The copies can be cast and moved by ``to``, as
    modules with fake weights otherwise can't.
    """
    if place is not None:
        let_be_guarded(place.type)
    fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    copies = {name: Twin(module).module for name, module in modules.items()}
    for made in copies.values():
        for table, name in _slots(made):
            weight = table[name]
            if id(weight) not in fakes:
                fake = fake_like(weight, mode)
                fakes[id(weight)] = weight, fake if place in (None, fake.device) else _moved(fake, mode, place)
            table[name] = fakes[id(weight)][1]
        vars(made)["_apply"] = functools.partial(_replace, made)
        for sub in made.modules():
            if "_hf_hook" in vars(sub):
                for name in _HOOKED:
                    vars(sub).pop(name, None)
    return copies


def _moved(fake: torch.Tensor, mode: FakeTensorMode, place: torch.device) -> torch.Tensor:
    with mode, torch.no_grad():
        moved = fake.detach().to(place)
    return nn.Parameter(moved, requires_grad=False) if isinstance(fake, nn.Parameter) else moved


def _double(pipeline: Any, modules: Mapping[str, nn.Module], device: torch.device) -> Any:
    """A copy of a pipeline around other modules, which takes ``device`` for its own."""
    kind = type(pipeline)
    place = property(lambda self: device)
    double = copy.copy(pipeline)
    double.__class__ = type(kind.__name__, (kind,), {"device": place, "_execution_device": place})
    # Not by setattr, by which a pipeline notes a component's class in its configuration.
    vars(double).update(modules, _all_hooks=[], _progress_bar_config={"disable": True})
    for name, part in pipeline.components.items():
        if hasattr(part, "set_timesteps"):
            vars(double)[name] = copy.deepcopy(part)
    return double


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module's weights stand: dictionaries, and names in them."""
    tables = [table for sub in module.modules() for table in (sub._parameters, sub._buffers)]
    return [(table, name) for table in tables for name, weight in table.items() if weight is not None]


def _replace(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Put ``change(weight)`` in the place of each weight, shared ones once: as ``_apply``, which balks at fake ones."""
    made: dict[int, Any] = {}
    for table, name in _slots(module):
        weight = table[name]
        if id(weight) not in made:
            with torch.no_grad():
                changed = change(weight)
            parameter = isinstance(weight, nn.Parameter) and not isinstance(changed, nn.Parameter)
            made[id(weight)] = weight, nn.Parameter(changed, requires_grad=False) if parameter else changed
        table[name] = made[id(weight)][1]
    return module


def _cast(module: nn.Module, dtypes: Sequence[torch.dtype]) -> None:
    """Give fake weights these dtypes, listed as ``_slots`` lists them."""
    wanted = {id(table[name]): dtype for (table, name), dtype in zip(_slots(module), dtypes, strict=True)}
    _replace(module, lambda x: x if x.dtype == wanted[id(x)] else x.to(wanted[id(x)]))


def _zeros(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).zero_()


def _alike(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of zeros of the same layout, in a storage of the same size."""
    size = tensor.untyped_storage().nbytes() // tensor.itemsize
    zeros = torch.zeros(size, dtype=tensor.dtype, device=device)
    return zeros.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _key(inputs: Inputs) -> Any:
    try:
        return inputs.key()
    except ValueError:  # arrays and their like, told apart by identity
        return inputs.spec, tuple(map(id, inputs.rest)), tuple(tensor.shape for tensor in inputs.tensors)
