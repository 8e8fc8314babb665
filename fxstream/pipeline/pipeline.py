"""Whole pipelines: their components' calls as stages, each planned against what the pipeline holds meanwhile."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxstream.budget import Budget
from fxstream.disk import Disk, Store
from fxstream.module import StreamedModule
from fxstream.pipeline.components import modules_of, refuse_compiled, streamed_methods
from fxstream.pipeline.offload import hook_again, hooks_removed, offloaded
from fxstream.pipeline.plan import PipelinePlan, StagePlan
from fxstream.pipeline.planning import plan_all
from fxstream.pipeline.rehearsal import rehearse
from fxstream.pipeline.stage import Made, Stage, stages_of, stream_method
from fxstream.pipeline.switches import turn_off

_INSTALLED = "_streamed_pipeline"


@dataclass
class Installation:
    """What ``optimize`` did to a pipeline: its stages, how to turn switches on again, what was planned at once."""

    budget: Budget
    stages: list[Stage] = field(default_factory=list)
    turn_on: list[Callable[[], None]] = field(default_factory=list)
    rehearsed: tuple[StagePlan, ...] = ()
    restored: bool = False

    def restore(self) -> None:
        """Turn on again what was turned off, once. Another pipeline that has the components runs the models, too."""
        if not self.restored:
            self.restored = True
            for turn_on in self.turn_on:
                turn_on()

    def plan(self) -> PipelinePlan:
        """What was planned before the first call, and what calls since have added."""
        at_once = {_kind(stage) for stage in self.rehearsed}
        later = [made for stage in self.stages for made in stage.plans(self.budget.total_bytes)]
        return PipelinePlan((*self.rehearsed, *(made for made in later if _kind(made) not in at_once)))


def _kind(stage: StagePlan) -> Any:
    """Equal for a call that was planned by shapes and the same call in earnest."""
    return stage.name, stage.plan and (stage.plan.before.nodes, stage.plan.before.live_bytes)


def optimize_pipeline(
    pipeline: Any, keywords: Mapping[str, Any], call: Mapping[str, Any], disk: Disk | None = None
) -> Any:
    """``optimize`` of a pipeline: each of its stages with ``keywords``; at once where ``call`` has arguments."""
    refuse_compiled(pipeline)
    hooked = offloaded(pipeline)  # what can't be streamed is refused before anything is done
    store = _store(pipeline, disk)
    keywords = {**keywords, "store": store}
    before = _installation(pipeline)
    rehearsal = rehearse(pipeline, call) if call else None
    installation, made = Installation(keywords["budget"]), Made()
    off: dict[str, list[str]] = {}
    with hooks_removed(pipeline, for_good=store is not None):
        try:
            for name, module in modules_of(pipeline).items():
                methods = stages_of(module, keywords)
                if streamed_methods(module):
                    off[name], turn_on = turn_off(module)
                    installation.turn_on.append(turn_on)
                installation.stages += [Stage(pipeline, name, method, keywords, made) for method in methods]
            if not installation.stages:
                raise ValueError(f"no component of {type(pipeline).__name__} takes a timestep or decodes")
            if rehearsal is not None:
                installation.rehearsed = plan_all(rehearsal, keywords, installation.stages).stages
            if store is not None:
                store.take_all()
        except BaseException:
            for turn_on in installation.turn_on:
                turn_on()
            raise
        if before is not None:
            installation.turn_on += before.turn_on
        if hooked and store is not None:
            installation.turn_on.append(functools.partial(hook_again, pipeline))
        _install(pipeline, installation, keywords)
    for name, switches in off.items():
        if switches:
            warnings.warn(
                f"{' and '.join(switches)} of the pipeline's {name} turned off: it would work against the plan, which "
                "needs no such switch. fxstream.restore(pipe) turns it on again",
                stacklevel=3,
            )
    return pipeline


def _store(pipeline: Any, disk: Disk | None) -> Store | None:
    """Where the weights of all components live, with ``disk``."""
    here = weakref.ref(pipeline)
    return None if disk is None else Store(disk, lambda: modules_of(here()).values() if here() else [], whole=True)


def plan_pipeline(
    pipeline: Any, keywords: Mapping[str, Any], call: Mapping[str, Any], disk: Disk | None = None
) -> PipelinePlan:
    """``plan`` of a pipeline, its stages planned with ``keywords``."""
    installation = _installation(pipeline)
    if installation is not None and not call:
        return installation.plan()
    refuse_compiled(pipeline)
    return plan_all(rehearse(pipeline, call), {**keywords, "store": _store(pipeline, disk)}, [])


def restore_pipeline(pipeline: Any) -> Any:
    """``restore``."""
    installation = _installation(pipeline)
    with hooks_removed(pipeline):
        for name, module in modules_of(pipeline).items():
            if isinstance(vars(pipeline)[name], StreamedModule):
                setattr(pipeline, name, module)
    if installation is not None:
        installation.restore()
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
        streamed = (
            stages["forward"].streamed if "forward" in stages else stream_method(module, "forward", None, keywords)
        )
        for method, stage in stages.items():
            vars(streamed)[method] = _method(installation, streamed, stage, getattr(module, method))
        vars(streamed).setdefault("forward", _method(installation, streamed, streamed.forward, module.forward))
        vars(streamed)[_INSTALLED] = installation
        setattr(pipeline, name, streamed)


def _method(
    installation: Installation, streamed: StreamedModule, function: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """``function`` with the signature of the component's own method, and run after the component's offloading hook.

    Accelerate sees to ``forward`` by itself; for other methods diffusers runs the hook, as here. To torch.compile of
    the component around it is opaque. When the pipeline is restored it is the component's own method.
    """

    @torch.compiler.disable
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        hook = vars(streamed).get("_hf_hook")
        if original.__name__ != "forward" and hasattr(hook, "pre_forward"):
            hook.pre_forward(streamed)
        return (original if installation.restored else function)(*args, **kwargs)

    return method
