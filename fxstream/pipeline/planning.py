"""All stages of a pipeline planned at once, by what a rehearsal of its call has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fxstream.budget import Budget, format_bytes
from fxstream.disk import Disk, Store
from fxstream.errors import CaptureError, MemoryBudgetError
from fxstream.pipeline.components import streamed_methods, weight_bytes
from fxstream.pipeline.plan import PipelinePlan, StagePlan
from fxstream.pipeline.rehearsal import Rehearsal, Rehearsed
from fxstream.pipeline.stage import Stage, kept_bytes, stage_plan, stages_of, stream_method
from fxstream.planned import compile_call
from fxstream.rehash.steps import RehashPlan
from fxstream.report import Plan

WHOLE = Budget(total_bytes=1 << 62)
"""A budget that asks for nothing."""


NO_STAGE = "it takes no time and decodes nothing, so it is taken for no part of the loop"


def plan_all(rehearsal: Rehearsal, keywords: Mapping[str, Any], stages: Sequence[Stage]) -> PipelinePlan:
    """Plan all that a rehearsal found, for the stages themselves where their components are as they were called."""
    total, store = keywords["budget"].total_bytes, keywords["store"]
    of = {(stage.component, stage.method): stage for stage in stages}
    planned: list[StagePlan] = []
    errors: dict[str, MemoryBudgetError] = {}
    for found in rehearsal.calls():
        module = rehearsal.modules[found.component]
        why = "" if found.method in stages_of(module, keywords) else NO_STAGE
        if store is not None:
            kept = kept_bytes(store, rehearsal.originals, found.component)
            found = replace(found, resident=replace(found.resident, weights=kept))
        made: Plan | RehashPlan | None = None
        try:
            if not why:
                made = _plan_one(rehearsal, found, keywords, of.get((found.component, found.method)))
        except MemoryBudgetError as error:
            errors[found.resident.stage] = error
            made = error.plan
        except CaptureError as error:
            apart = error.data_dependent and not keywords.get("fullgraph", False)
            if streamed_methods(module) and not apart:
                raise
            why = " ".join(str(error).split())
        if why:
            made = _plan_whole(rehearsal, found)
            if store is not None:
                weights = {**weight_bytes({found.component: module}), **found.resident.weights}
                found = replace(found, resident=replace(found.resident, weights=weights))
        offloaded = store is not None and not why
        planned.append(stage_plan(found.component, found.calls, made, found.resident, total, offloaded, why))
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
    if keywords["store"] is not None:
        keywords = {**keywords, "store": Store(Disk(), lambda: [module])}
    return stream_method(module, found.method, lambda tensors: found.resident, keywords).prepare(*args, **kwargs)


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
