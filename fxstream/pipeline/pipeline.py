"""Whole pipelines: their components' calls as stages, each planned against what the pipeline holds meanwhile."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fxstream.budget import Budget, Resident, format_bytes
from fxstream.errors import CaptureError, MemoryBudgetError
from fxstream.model import optimize_model
from fxstream.module import StreamedModule
from fxstream.passes.graph.capture import owner
from fxstream.passes.graph.effects import draws
from fxstream.passes.graph.liveness import storages_of
from fxstream.passes.graph.structure import flatten
from fxstream.pipeline.components import modules_of, stage_name, streamed_methods, weight_bytes, weights_of
from fxstream.pipeline.offload import hooks_removed, offloaded
from fxstream.pipeline.plan import PipelinePlan, StagePlan
from fxstream.pipeline.rehearsal import Rehearsal, Rehearsed, rehearse
from fxstream.pipeline.switches import turn_off
from fxstream.planned import compile_call
from fxstream.rehash.rehash import RehashedModule
from fxstream.rehash.steps import RehashPlan
from fxstream.report import Plan

WHOLE = Budget(total_bytes=1 << 62)
"""A budget that asks for nothing."""

_INSTALLED = "_streamed_pipeline"


@dataclass
class Installation:
    """What ``optimize`` did to a pipeline: its stages, how to turn switches on again, what was planned at once."""

    budget: Budget
    stages: list[Stage] = field(default_factory=list)
    turn_on: list[Callable[[], None]] = field(default_factory=list)
    rehearsed: tuple[StagePlan, ...] = ()

    def plan(self) -> PipelinePlan:
        """What was planned before the first call, and what calls since have added."""
        at_once = {_kind(stage) for stage in self.rehearsed}
        later = [made for stage in self.stages for made in stage.plans(self.budget.total_bytes)]
        return PipelinePlan((*self.rehearsed, *(made for made in later if _kind(made) not in at_once)))


def _stream(
    module: nn.Module,
    method: str,
    resident: Callable[[Sequence[torch.Tensor]], Resident] | None,
    keywords: Mapping[str, Any],
) -> StreamedModule:
    """A component's method streamed, as the ``keywords`` of ``optimize_model`` ask; denoisers alone skip steps."""
    if "forward" not in streamed_methods(module):
        keywords = {**keywords, "step_rehash": None}
    return optimize_model(module if method == "forward" else getattr(module, method), resident=resident, **keywords)


def _stage_plan(
    name: str,
    calls: int | None,
    made: Plan | RehashPlan | None,
    resident: Resident,
    budget_bytes: int | None,
    streamed: bool = True,
) -> StagePlan:
    """A stage by the plan of its call that holds most."""
    if isinstance(made, RehashPlan):
        made, held = made.largest
        resident = replace(resident, other_bytes=resident.other_bytes + held)
    return StagePlan(name, calls, made, resident, budget_bytes, streamed)


def _kind(stage: StagePlan) -> Any:
    """Equal for a call that was planned by shapes and the same call in earnest."""
    return stage.name, stage.plan and (stage.plan.before.nodes, stage.plan.before.live_bytes)


class Stage:
    """A component's method, streamed. Called as the method is."""

    def __init__(self, pipeline: Any, component: str, method: str, keywords: Mapping[str, Any], made: Made) -> None:
        module = modules_of(pipeline)[component]
        self.component, self.method = component, method
        self.name = stage_name(component, method)
        self.expected: Resident | None = None
        self._pipeline = weakref.ref(pipeline)
        self._made = made
        self.streamed = _stream(module, method, self.resident, keywords)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # One plan serves calls with a generator and without, unless random numbers are drawn from it.
        if any(_is_generator(x) for x in (*args, *kwargs.values())):
            others = tuple(None if _is_generator(x) else x for x in args)
            named = {name: None if _is_generator(x) else x for name, x in kwargs.items()}
            if not self._draws(self.streamed.prepare(*others, **named)):
                args, kwargs = others, named
        self._made.enter(self)
        result = type(self.streamed).forward(self.streamed, *args, **kwargs)
        self._made.add(result)
        return result

    def resident(self, tensors: Sequence[torch.Tensor]) -> Resident:
        """What is on the inputs' device now: all weights there, and what stages made and the pipeline still has."""
        if self.expected is not None:
            return self.expected
        pipeline = self._pipeline()
        mine = owner(self.streamed)[0]
        modules = modules_of(pipeline) if pipeline is not None else {self.component: mine}
        device = tensors[0].device if tensors else next(weights_of(mine)).device
        return Resident(self.name, weight_bytes(modules, device), self._made.bytes(tensors, device))

    def plans(self, budget_bytes: int | None) -> list[StagePlan]:
        """The plans made so far."""
        return [
            _stage_plan(self.name, None, compiled.plan, compiled.resident, budget_bytes)
            for compiled in self.streamed._compiled.values()
            if compiled.resident is not None
        ]

    def _draws(self, made: Any) -> bool:
        """Whether what was planned draws random numbers."""
        compiled = next(compiled for compiled in self.streamed._compiled.values() if compiled.plan is made)
        return any(map(draws, compiled.captured.graph_module.graph.nodes))


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


def optimize_pipeline(pipeline: Any, keywords: Mapping[str, Any], call: Mapping[str, Any]) -> Any:
    """``optimize`` of a pipeline: each of its stages with ``keywords``; at once where ``call`` has arguments."""
    offloaded(pipeline)  # what can't be streamed is refused before anything is done
    before = _installation(pipeline)
    rehearsal = rehearse(pipeline, call) if call else None
    installation, made = Installation(keywords["budget"]), Made()
    off: dict[str, list[str]] = {}
    with hooks_removed(pipeline):
        try:
            for name, module in modules_of(pipeline).items():
                methods = streamed_methods(module)
                if methods:
                    off[name], turn_on = turn_off(module)
                    installation.turn_on.append(turn_on)
                installation.stages += [Stage(pipeline, name, method, keywords, made) for method in methods]
            if not installation.stages:
                raise ValueError(f"no component of {type(pipeline).__name__} takes a timestep or decodes")
            if rehearsal is not None:
                installation.rehearsed = _plan_all(rehearsal, keywords, installation.stages).stages
        except BaseException:
            for turn_on in installation.turn_on:
                turn_on()
            raise
        if before is not None:
            installation.turn_on += before.turn_on
        _install(pipeline, installation, keywords)
    for name, switches in off.items():
        if switches:
            warnings.warn(
                f"{' and '.join(switches)} of the pipeline's {name} turned off: it would work against the plan, which "
                "needs no such switch. fxstream.restore(pipe) turns it on again",
                stacklevel=3,
            )
    return pipeline


def plan_pipeline(pipeline: Any, keywords: Mapping[str, Any], call: Mapping[str, Any]) -> PipelinePlan:
    """``plan`` of a pipeline, its stages planned with ``keywords``."""
    installation = _installation(pipeline)
    if installation is not None and not call:
        return installation.plan()
    return _plan_all(rehearse(pipeline, call), keywords, [])


def restore_pipeline(pipeline: Any) -> Any:
    """``restore``."""
    installation = _installation(pipeline)
    with hooks_removed(pipeline):
        for name, module in modules_of(pipeline).items():
            if isinstance(vars(pipeline)[name], StreamedModule):
                setattr(pipeline, name, module)
    if installation is not None:
        for turn_on in installation.turn_on:
            turn_on()
    return pipeline


def _installation(pipeline: Any) -> Installation | None:
    found = (vars(part).get(_INSTALLED) for part in pipeline.components.values() if isinstance(part, nn.Module))
    return next((installation for installation in found if installation is not None), None)


def _install(pipeline: Any, installation: Installation, keywords: Mapping[str, Any]) -> None:
    modules = modules_of(pipeline)
    for name in dict.fromkeys(stage.component for stage in installation.stages):
        stages = {stage.method: stage for stage in installation.stages if stage.component == name}
        module = modules[name]
        # A codec is streamed by its methods; the module around them still needs something to run by itself.
        streamed = stages["forward"].streamed if "forward" in stages else _stream(module, "forward", None, keywords)
        for method, stage in stages.items():
            vars(streamed)[method] = _method(streamed, stage, getattr(module, method))
        vars(streamed).setdefault("forward", _method(streamed, streamed.forward, module.forward))
        vars(streamed)[_INSTALLED] = installation
        setattr(pipeline, name, streamed)


def _method(streamed: StreamedModule, function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the signature of the component's own method, and run after the component's offloading hook.

    Accelerate sees to ``forward`` by itself; for other methods diffusers runs the hook, as here.
    """

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        hook = vars(streamed).get("_hf_hook")
        if original.__name__ != "forward" and hasattr(hook, "pre_forward"):
            hook.pre_forward(streamed)
        return function(*args, **kwargs)

    return method


def _plan_all(rehearsal: Rehearsal, keywords: Mapping[str, Any], stages: Sequence[Stage]) -> PipelinePlan:
    """Plan all that a rehearsal found, for the stages themselves where their components are as they were called."""
    total = keywords["budget"].total_bytes
    of = {(stage.component, stage.method): stage for stage in stages}
    planned: list[StagePlan] = []
    errors: dict[str, MemoryBudgetError] = {}
    for found in rehearsal.calls():
        streamed = bool(streamed_methods(rehearsal.modules[found.component]))
        made: Plan | RehashPlan | None
        try:
            if streamed:
                made = _plan_one(rehearsal, found, keywords, of.get((found.component, found.method)))
            else:
                made = _plan_whole(rehearsal, found)
        except MemoryBudgetError as error:
            errors[found.resident.stage] = error
            made = error.plan
        planned.append(_stage_plan(found.resident.stage, found.calls, made, found.resident, total, streamed))
    whole = PipelinePlan(tuple(planned))
    over = [stage for stage in planned if stage.fits is False or stage.name in errors]
    if over:
        raise _error(whole, over, errors)
    return whole


def _plan_one(
    rehearsal: Rehearsal, found: Rehearsed, keywords: Mapping[str, Any], stage: Stage | None
) -> Plan | RehashPlan:
    if stage is not None and rehearsal.is_as_called(found):
        stage.expected = found.resident
        try:
            return stage.streamed.prepare(*found.args, **found.kwargs)
        finally:
            stage.expected = None
    module, args, kwargs = rehearsal.as_called(found)
    return _stream(module, found.method, lambda tensors: found.resident, keywords).prepare(*args, **kwargs)


def _plan_whole(rehearsal: Rehearsal, found: Rehearsed) -> Plan | None:
    """The plan of a component that is left as it is; None where it can't be captured."""
    module, args, kwargs = rehearsal.as_called(found)
    try:
        return compile_call(module, args, kwargs, WHOLE).plan
    except (CaptureError, ValueError):
        return None


def _error(planned: PipelinePlan, over: Sequence[StagePlan], errors: Mapping[str, MemoryBudgetError]) -> Exception:
    """The error of the stage that lacks most, naming the others."""
    worst = max(over, key=lambda stage: stage.total_bytes or 0)
    error = errors.get(worst.name)
    names = ", ".join(dict.fromkeys(stage.name for stage in over if stage.name != worst.name))
    if error is not None:
        message, budget, lowest = str(error), error.budget_bytes, error.lowest_bytes
    else:
        assert worst.budget_bytes is not None and worst.total_bytes is not None
        budget, lowest = worst.budget_bytes, worst.total_bytes
        message = (
            f"{worst.name}: the budget of {format_bytes(budget)} can't be met; it runs whole and needs "
            f"{format_bytes(lowest)} ({lowest} bytes), {format_bytes(worst.resident.bytes)} of them the pipeline's"
        )
    if names:
        message += f"\n  Nor do these stages fit: {names}."
    holders = error.holders if error is not None else worst.plan.after.holders if worst.plan else ()
    return MemoryBudgetError(
        message, budget_bytes=budget, lowest_bytes=lowest, holders=holders, plan=planned, stage=worst.name
    )
