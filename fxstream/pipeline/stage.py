"""Stages: a component's method, streamed, and what the pipeline holds while one runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxstream.budget import Resident
from fxstream.disk import Calls, Store
from fxstream.errors import CaptureError
from fxstream.model import optimize_model
from fxstream.module import StreamedModule
from fxstream.passes.graph.capture import owner
from fxstream.passes.graph.effects import draws
from fxstream.passes.graph.liveness import storages_of
from fxstream.passes.graph.structure import flatten
from fxstream.pipeline.components import (
    modules_of,
    same_device,
    stage_name,
    streamed_methods,
    weight_bytes,
    weights_of,
)
from fxstream.pipeline.plan import StagePlan
from fxstream.rehash.rehash import RehashedModule
from fxstream.rehash.steps import RehashPlan
from fxstream.report import Plan


def stages_of(module: nn.Module, keywords: Mapping[str, Any]) -> tuple[str, ...]:
    """The methods of a component that become stages: with weights on disk, of each the call at least."""
    return streamed_methods(module) or (("forward",) if keywords["store"] is not None else ())


def stream_method(
    module: nn.Module,
    method: str,
    resident: Callable[[Sequence[torch.Tensor]], Resident] | None,
    keywords: Mapping[str, Any],
) -> StreamedModule:
    """A component's method streamed, as the ``keywords`` of ``optimize_model`` ask; denoisers alone skip steps."""
    if "forward" not in streamed_methods(module):
        keywords = {**keywords, "step_rehash": None}
    return optimize_model(module if method == "forward" else getattr(module, method), resident=resident, **keywords)


def stage_plan(
    component: str,
    calls: int | None,
    made: Plan | RehashPlan | None,
    resident: Resident,
    budget_bytes: int | None,
    offloaded: bool,
    why: str = "",
) -> StagePlan:
    """A stage by the plan of its call that holds most; where its weights are ``offloaded``, with those that stay.

    ``why`` it runs whole, if it does.
    """
    if isinstance(made, RehashPlan):
        made, held = made.largest
        resident = replace(resident, other_bytes=resident.other_bytes + held)
    if offloaded and made is not None and made.after.weight_bytes:
        resident = replace(resident, weights={component: made.after.weight_bytes, **resident.weights})
    return StagePlan(resident.stage, calls, made, resident, budget_bytes, not why, why)


class Stage:
    """A component's method, streamed. Called as the method is."""

    def __init__(self, pipeline: Any, component: str, method: str, keywords: Mapping[str, Any], made: Made) -> None:
        module = modules_of(pipeline)[component]
        self.component, self.method = component, method
        self.name = stage_name(component, method)
        self.expected: Resident | None = None
        self._whole: Calls | None = None
        self._pipeline, self._modules = weakref.ref(pipeline), modules_of(pipeline)
        self._made = made
        self._store: Store | None = keywords["store"]
        self.streamed = stream_method(module, method, self.resident, keywords)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # One plan serves calls with a generator and without, unless random numbers are drawn from it.
        if any(_is_generator(x) for x in (*args, *kwargs.values())):
            others = tuple(None if _is_generator(x) else x for x in args)
            named = {name: None if _is_generator(x) else x for name, x in kwargs.items()}
            if not self._draws(others, named):
                args, kwargs = others, named
        self._made.enter(self)
        result = self._run(args, kwargs)
        self._made.add(result)
        return result

    def _run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        module = owner(self.streamed)[0]
        if self._whole is None:
            try:
                return type(self.streamed).forward(self.streamed, *args, **kwargs)
            except CaptureError:
                if streamed_methods(module):
                    raise
                weights = weights_of(module)
                self._whole = Calls(weights, weights)  # from now on it runs as it is
        assert self._store is not None
        self._store.begin(self._whole)
        return module(*args, **kwargs)

    def resident(self, tensors: Sequence[torch.Tensor]) -> Resident:
        """What is on the inputs' device now: all weights there, and what stages made and the pipeline still has."""
        if self.expected is not None:
            return self.expected
        pipeline = self._pipeline()
        mine = owner(self.streamed)[0]
        modules = modules_of(pipeline) if pipeline is not None else self._modules  # another pipeline may have them
        device = tensors[0].device if tensors else weights_of(mine)[0].device
        if self._store is not None:
            weights = kept_bytes(self._store, modules, self.component)
        else:
            weights = weight_bytes(modules, lambda weight: same_device(weight.device, device))
        return Resident(self.name, weights, self._made.bytes(tensors, device))

    def plans(self, budget_bytes: int | None) -> list[StagePlan]:
        """The plans made so far."""
        made = [*self.streamed._compiled.values()]
        if self.streamed._submodules is not None:  # of these the one that holds most
            made += sorted(self.streamed._submodules.compiled, key=lambda compiled: compiled.plan.peak_bytes)[-1:]
        return [
            stage_plan(self.component, None, compiled.plan, compiled.resident, budget_bytes, self._store is not None)
            for compiled in made
            if compiled.resident is not None
        ]

    def _draws(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call draws random numbers; one that is no single graph may."""
        try:
            made = self.streamed.prepare(*args, **kwargs)
        except CaptureError as error:
            if not self.streamed.runs_without_graph(error):
                raise
            return True
        compiled = next(compiled for compiled in self.streamed._compiled.values() if compiled.plan is made)
        return any(map(draws, compiled.captured.graph_module.graph.nodes))


def kept_bytes(store: Store, modules: Mapping[str, nn.Module], component: str) -> dict[str, int]:
    """Bytes of the weights of components beside one that are in memory all the time."""
    kept = store.kept()
    others = {name: module for name, module in modules.items() if name != component}
    return weight_bytes(others, lambda weight: weight.untyped_storage()._cdata in kept)


def _is_generator(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) and value else [value]
    return all(isinstance(x, torch.Generator) for x in values)


class Made:
    """The storages of what the stages of a pipeline have returned, as long as something holds them.

    What a denoiser holds between its steps is forgotten when another stage begins.
    """

    def __init__(self) -> None:
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._last: weakref.ref[Stage] | None = None

    def enter(self, stage: Stage) -> None:
        last = self._last() if self._last is not None else None
        if last is not None and last is not stage and isinstance(last.streamed, RehashedModule):
            last.streamed.forget()
        self._last = weakref.ref(stage)

    def add(self, result: Any) -> None:
        self._storages = [ref for ref in self._storages if ref() is not None]
        self._storages += [weakref.ref(tensor.untyped_storage()) for tensor in flatten(result)[0]]

    def bytes(self, apart: Sequence[torch.Tensor], device: torch.device) -> int:
        """Bytes on a device, those under the tensors ``apart`` not counted."""
        counted = {key for tensor in apart for key, _ in storages_of(tensor)}
        size = 0
        for ref in self._storages:
            storage = ref()
            if storage is not None and storage.device == device and storage._cdata not in counted:
                counted.add(storage._cdata)
                size += storage.nbytes()
        return size
