"""What a user calls: ``plan`` and ``optimize``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxstream.budget import Budget, format_bytes
from fxstream.errors import MemoryBudgetError
from fxstream.module import StreamedModule
from fxstream.passes.capture import Captured, capture
from fxstream.passes.liveness import MemoryProfile, profile
from fxstream.passes.normalize import normalize
from fxstream.passes.stream import stream
from fxstream.rehash import RehashedModule, StepRehash
from fxstream.report import Plan, make_plan
from fxstream.steps import StepGraphs, places


@dataclass(frozen=True)
class Compiled:
    """A planned call: the rewritten graph, how to call it, and the plan that it carries out."""

    captured: Captured
    graph_module: fx.GraphModule
    plan: Plan


def plan(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    memory_budget: str | int | float = "min",
) -> Plan:
    """Plan one call of a module, or of a bound method of one. Runs nothing, changes nothing.

    ``args`` and ``kwargs`` are example inputs; they and the weights may be fake or on the meta device.
    ``memory_budget`` is as for ``optimize``.

    Raises ``ValueError`` (the budget can't be read, the inputs don't fit the model's signature), ``CaptureError`` (the
    model can't be captured as one graph) and ``MemoryBudgetError`` (no plan meets the budget).
    """
    return compile_call(model, args, kwargs or {}, Budget.parse(memory_budget)).plan


def optimize(
    model: Callable[..., Any],
    memory_budget: str | int | float,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    step_rehash: StepRehash | None = None,
) -> StreamedModule:
    """A module that stands where ``model`` stood, and computes the same within a memory budget.

    ``memory_budget`` is all that a call may hold (weights, inputs and activations) as ``"6GiB"`` or an int of bytes;
    or a float in (0, 1), the share of the captured graph's activation peak; or ``"min"``, the lowest reachable.

    With example inputs the model is captured and planned now, else at the first call. The weights are shared with
    ``model``, not copied. Inference only. Raises as ``plan`` does; nothing is changed then.

    With ``step_rehash`` some denoising steps are skipped: the result is a ``RehashedModule``, and no longer exact. What
    is held between steps counts in the budget. Raises ``ValueError`` where the cut can't be made.
    """
    budget = Budget.parse(memory_budget)

    def compiler(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
        return compile_call(model, args, kwargs, budget)

    streamed = StreamedModule(model, compiler) if step_rehash is None else rehash_module(model, budget, step_rehash)
    if example_args is not None or example_kwargs is not None:
        streamed.prepare(*(example_args or ()), **(example_kwargs or {}))
    return streamed


def rehash_module(model: Callable[..., Any], budget: Budget | None, rehash: StepRehash) -> RehashedModule:
    """A module that skips steps; without a budget its graphs run as they were captured."""

    def compiler(args: Sequence[Any], kwargs: Mapping[str, Any]) -> StepGraphs:
        if rehash.calibration is not None:
            rehash.calibration.check_model(model)
        latent, timestep = places(model, args, kwargs, rehash.timestep)
        began = time.perf_counter()
        captured = capture(model, args, kwargs)
        normalize(captured.graph_module)
        before, seconds = profile(captured.graph_module), time.perf_counter() - began

        def fit(graph_module: fx.GraphModule, held_bytes: int) -> tuple[fx.GraphModule, Plan]:
            return fit_graph(graph_module, budget, before, seconds, held_bytes)

        graphs = StepGraphs(captured, latent, timestep, rehash, fit)
        graphs.planned(1)
        return graphs

    return RehashedModule(model, compiler, rehash)


def compile_call(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], budget: Budget) -> Compiled:
    """Capture, plan and rewrite one call."""
    began = time.perf_counter()
    captured = capture(model, args, kwargs)
    graph_module = normalize(captured.graph_module)
    seconds = time.perf_counter() - began
    return Compiled(captured, *fit_graph(graph_module, budget, profile(graph_module), seconds))


def fit_graph(
    graph_module: fx.GraphModule, budget: Budget | None, model: MemoryProfile, seconds: float, held_bytes: int = 0
) -> tuple[fx.GraphModule, Plan]:
    """Rewrite a graph to a budget, beside ``held_bytes`` that others hold.

    ``model`` is the profile of the captured graph, whose weights and inputs are held and whose peak a share refers to;
    its capture took ``seconds``.
    """
    planning = time.perf_counter()
    before = profile(graph_module)
    held = model.weight_bytes + model.input_bytes + held_bytes
    if budget is None:
        allowed: int | None = before.peak_bytes
    elif budget.share is not None:
        allowed = int(budget.share * model.peak_bytes) - held_bytes
    else:
        allowed = budget.activation_bytes(model.peak_bytes, held)
    streamed = stream(graph_module, allowed)
    failed = allowed is not None and streamed.after.peak_bytes > allowed
    if failed:
        streamed = stream(graph_module, None)
    made = make_plan(before, streamed, allowed, {"capture": seconds, "planning": time.perf_counter() - planning})
    if failed:
        assert allowed is not None and budget is not None
        raise _budget_error(made, budget, allowed, held, held_bytes)
    return streamed.graph_module, made


def _budget_error(made: Plan, budget: Budget, allowed: int, held: int, cached: int) -> MemoryBudgetError:
    account = "activations alone" if budget.share is not None else "weights, inputs and activations"
    extra = cached if budget.share is not None else held
    lowest = made.after.peak_bytes + extra
    largest = made.after.holders[0] if made.after.holders else None
    where = made.after.nodes[made.after.peak_index]
    message = (
        f"the budget of {format_bytes(allowed + extra)} for {account} can't be met; the lowest reachable is "
        f"{format_bytes(lowest)} ({lowest} bytes). It is reached at {where}"
    )
    if largest is not None:
        message += f", where the largest tensor is {largest.node} of {largest.module_path or 'the model'}"
        message += f" ({format_bytes(largest.bytes)})"
    if cached:
        message += f". Held between steps: {format_bytes(cached)}"
    if budget.share is None and held >= allowed + extra:
        message += f". Weights and inputs alone hold {format_bytes(held - cached)}"
    message += (
        '. Ask for memory_budget="min", a larger budget, or a smaller input; the error\'s plan shows what holds it.'
    )
    return MemoryBudgetError(
        message, budget_bytes=allowed + extra, lowest_bytes=lowest, holders=made.after.holders, plan=made
    )
