"""Planned calls: from a model and its inputs to the rewritten graph and the plan that it carries out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxstream.budget import Budget, Resident, format_bytes
from fxstream.caches import refuse_caches
from fxstream.card import fit_to_card, is_on_card
from fxstream.disk import Disk, kept_weights
from fxstream.errors import MemoryBudgetError
from fxstream.passes.graph.call import ROOT, Captured
from fxstream.passes.graph.capture import capture, written
from fxstream.passes.graph.internal import internal_errors
from fxstream.passes.graph.liveness import MemoryProfile, profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.graph.places import Place
from fxstream.passes.graph.reserve import reserve_of
from fxstream.passes.graph.settle import same_call
from fxstream.passes.graph.turns import turn
from fxstream.passes.machine.card import OVERHEAD
from fxstream.passes.offload import offload
from fxstream.passes.stream import Streamer
from fxstream.report import Plan, make_plan


@dataclass(frozen=True)
class Compiled:
    """A planned call: the rewritten graph, how to call it, and the plan that it carries out.

    ``resident`` is what was held beside it when it was planned, where that is more than the graph's own weights.
    ``run`` is the graph as it is or compiled: flat tensors in, flat tensors out.
    """

    captured: Captured
    graph_module: fx.GraphModule
    plan: Plan
    run: Callable[..., Sequence[torch.Tensor]]
    resident: Resident | None = None


@turn()
def compile_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    budget: Budget,
    allow_recompute: bool = False,
    resident: Resident | None = None,
    backend: str | None = None,
    live: Collection[Place] = (),
    disk: Disk | None = None,
    known: Sequence[Compiled] = (),
) -> Compiled:
    """Capture, plan and rewrite one call; compile it by ``backend`` if there is one.

    Tensors at ``live`` places in the model are inputs of the graph. With ``disk`` its weights may live there, and
    activations that nothing else makes fit. Where the graph is that of a ``known`` call, its plan serves.
    """
    refuse_caches(model)
    began = time.perf_counter()
    captured = normalized(capture(model, args, kwargs, live, lifting=True))
    for each in known:
        if each.resident == resident and same_call(each.captured.graph_module, captured.graph_module):
            return replace(each, captured=captured)
    planned = plan_captured(captured, budget, began, allow_recompute, resident, disk)
    return replace(planned, run=compiled_by(backend, planned.graph_module))


def normalized(captured: Captured) -> Captured:
    """A captured call with its graph normalized, in place."""
    with internal_errors("normalizing", captured.graph_module):
        normalize(captured.graph_module)
    return captured


@turn()
def plan_captured(
    captured: Captured,
    budget: Budget,
    began: float,
    allow_recompute: bool = False,
    resident: Resident | None = None,
    disk: Disk | None = None,
) -> Compiled:
    """Plan and rewrite a captured and normalized call; ``began`` is when its capture did, by ``time.perf_counter``."""
    graph_module = captured.graph_module
    seconds = time.perf_counter() - began
    if disk is not None:
        fitted, made = fit_with_weights(graph_module, budget, disk, seconds, allow_recompute, resident)
    else:
        fitted, made = fit_graph(graph_module, budget, seconds, allow_recompute, resident)
    return Compiled(captured, fitted, made, fitted.forward, resident)


def fit_graph(
    graph_module: fx.GraphModule,
    budget: Budget | None,
    seconds: float,
    allow_recompute: bool = False,
    resident: Resident | None = None,
    held_bytes: int = 0,
    model: MemoryProfile | None = None,
) -> tuple[fx.GraphModule, Plan]:
    """Rewrite a graph to a budget, beside ``held_bytes`` that are held for the steps to come.

    ``model`` is the profile of the whole captured graph, if that is another: its weights and inputs are held, and a
    share refers to its peak. Its capture took ``seconds``.
    """
    planning = time.perf_counter()
    with internal_errors("planning", graph_module):
        before = profile(graph_module)
    model = model or before
    held = (model.weight_bytes if resident is None else resident.bytes) + int(model.input_bytes)
    if budget is None:
        allowed: int | None = before.peak_bytes
    else:
        allowed = budget.activation_bytes(model.peak_bytes, held, held_bytes)
    beside = max(0, held + held_bytes - before.weight_bytes - int(before.input_bytes))
    on_card = is_on_card(graph_module)
    total = budget.total_bytes if on_card and budget is not None else None
    with internal_errors("planning", graph_module):
        streamer = Streamer(graph_module, allow_recompute)
        if total is None or allowed is None:
            streamed = streamer(allowed)
            reserve = reserve_of(streamed.graph_module, (beside,)) if on_card else None
        else:
            allowed -= OVERHEAD
            streamed, reserve = fit_to_card(streamer, allowed, total, beside)
        times = {"capture": seconds, "planning": time.perf_counter() - planning}
        made = make_plan(graph_module, before, streamed, allowed, times, reserve=reserve)
    over = allowed is not None and streamed.after.peak_bytes > allowed
    if total is not None and reserve is not None:
        over = over or reserve.reserved + OVERHEAD > total
    if budget is not None and allowed is not None and over:
        raise _budget_error(made, budget, allowed, held, held_bytes, resident, total=total)
    return written(streamed.graph_module), made


def fit_with_weights(
    graph_module: fx.GraphModule,
    budget: Budget,
    disk: Disk,
    seconds: float,
    allow_recompute: bool = False,
    resident: Resident | None = None,
) -> tuple[fx.GraphModule, Plan]:
    """Rewrite a graph to a budget for its activations and those of its weights that are on the device together.

    A share refers to the captured graph's peak and all its weights. ``resident`` is held beside them. The graph's
    capture took ``seconds``.
    """
    planning = time.perf_counter()
    with internal_errors("planning", graph_module):
        before = profile(graph_module)
        held = int(before.input_bytes) + (0 if resident is None else resident.bytes)
        limit = budget.activation_bytes(before.peak_bytes + before.weight_bytes, held)
        kept = kept_weights(graph_module)
        block, homes = offload(graph_module, limit, allow_recompute, kept, disk.folder or "")
        times = {"capture": seconds, "planning": time.perf_counter() - planning}
        made = make_plan(graph_module, before, block, limit, times, homes)
    if limit is not None and homes.peak_bytes > limit:
        raise _budget_error(made, budget, limit, held, 0, resident, kept)
    return written(block.graph_module), made


def compiled_by(backend: str | None, graph_module: fx.GraphModule) -> Callable[..., Any]:
    """The graph as it is run: compiled by a backend of torch.compile, if one is named."""
    if backend is None:
        return graph_module.forward
    from fxstream.compiled import compile_by

    return compile_by(backend, graph_module).forward


def _budget_error(
    made: Plan,
    budget: Budget,
    allowed: int,
    held: int,
    cached: int,
    resident: Resident | None,
    kept: Collection[str] | None = None,
    total: int | None = None,
) -> MemoryBudgetError:
    offloaded = kept is not None
    account = "weights, inputs and activations"
    if budget.share is not None:
        account = "weights and activations" if offloaded else "activations alone"
    extra = cached if budget.share is not None else held + cached
    lowest = made.after.peak_bytes + extra + (made.after.weight_bytes if offloaded else 0)
    if total is not None and made.reserve is not None:
        account, extra = "all that the process holds of the card", total - allowed
        lowest = made.reserve.reserved + OVERHEAD
    largest = made.after.holders[0] if made.after.holders else None
    where = made.after.nodes[made.after.peak_index]
    stage = resident.stage if resident else ""
    message = f"{stage}: " if stage else ""
    message += (
        f"the budget of {format_bytes(allowed + extra)} for {account} can't be met; the lowest reachable is "
        f"{format_bytes(lowest)} ({lowest} bytes). It is reached at {where}"
    )
    if largest is not None:
        message += f", where the largest tensor is {largest.node} of {largest.module_path or 'the model'}"
        message += f" ({format_bytes(largest.bytes)})"
    if kept:
        some = min(kept).removeprefix(f"{ROOT}.")
        message += (
            f". {len(kept)} of the weights stay, such as {some}: something beside the model holds their memory, too"
        )
    if cached:
        message += f". Held between steps: {format_bytes(cached)}"
    if budget.share is None and held + cached >= allowed + extra:
        message += f". {'Inputs' if offloaded else 'Weights and inputs'} alone hold {format_bytes(held)}"
        if not offloaded and made.weight_bytes:
            message += ': with offload="disk" weights can be read when they are needed'
    elif stage and budget.share is None:
        own = "weights and activations" if offloaded else "activations"
        message += f". Beside its {own} the pipeline holds {format_bytes(held + cached)}"
    message += (
        '. Ask for memory_budget="min", a larger budget, or a smaller input; the error\'s plan shows what holds it.'
    )
    return MemoryBudgetError(
        message,
        budget_bytes=allowed + extra,
        lowest_bytes=lowest,
        holders=made.after.holders,
        plan=made,
        stage=stage,
    )
