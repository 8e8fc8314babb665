"""What a user calls: ``plan`` and ``optimize``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxstream.budget import Budget, format_bytes
from fxstream.errors import MemoryBudgetError
from fxstream.module import Region, StreamedModule
from fxstream.passes.capture import Captured, capture
from fxstream.passes.liveness import profile
from fxstream.passes.normalize import normalize
from fxstream.passes.stream import stream
from fxstream.report import Plan, make_plan


@dataclass(frozen=True)
class Compiled:
    """A planned call: the rewritten graph, how to call it, and the plan that it carries out.

    ``run`` is the graph as it is or compiled: flat tensors in, flat tensors out.
    """

    captured: Captured
    graph_module: fx.GraphModule
    plan: Plan
    run: Callable[..., Sequence[torch.Tensor]]


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
    compile: str | None = None,
) -> StreamedModule:
    """A module that stands where ``model`` stood, and computes the same within a memory budget.

    ``memory_budget`` is all that a call may hold (weights, inputs and activations) as ``"6GiB"`` or an int of bytes;
    or a float in (0, 1), the share of the captured graph's activation peak; or ``"min"``, the lowest reachable.

    ``compile`` names a backend of torch.compile, such as ``"inductor"``, that compiles what is planned: the loops'
    bodies, each once, and what is between the loops.

    With example inputs the model is captured and planned now, else at the first call. The weights are shared with
    ``model``, not copied. Inference only. Raises as ``plan`` does; nothing is changed then.
    """
    budget = Budget.parse(memory_budget)
    backend = None
    if compile is not None:
        from fxstream.compiled import check_compiler  # and with it Dynamo, which takes seconds

        backend = check_compiler(compile, "compile")

    def compiler(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
        return compile_call(model, args, kwargs, budget, backend)

    streamed = StreamedModule(model, compiler, Region(budget, backend))
    if example_args is not None or example_kwargs is not None:
        streamed.prepare(*(example_args or ()), **(example_kwargs or {}))
    return streamed


def compile_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    budget: Budget,
    backend: str | None = None,
) -> Compiled:
    """Capture, plan and rewrite one call; compile it by ``backend`` if there is one."""
    began = time.perf_counter()
    planned = plan_captured(capture(model, args, kwargs), budget, began)
    if backend is None:
        return planned
    from fxstream.compiled import compile_by

    return replace(planned, run=compile_by(backend, planned.graph_module))


def plan_captured(captured: Captured, budget: Budget, began: float) -> Compiled:
    """Plan and rewrite a captured call; ``began`` is when its capture did, by ``time.perf_counter``."""
    graph_module = normalize(captured.graph_module)
    planning = time.perf_counter()
    before = profile(graph_module)
    held = before.weight_bytes + before.input_bytes
    allowed = budget.activation_bytes(before.peak_bytes, held)
    streamed = stream(graph_module, allowed)
    failed = allowed is not None and streamed.after.peak_bytes > allowed
    if failed:
        streamed = stream(graph_module, None)
    seconds = {"capture": planning - began, "planning": time.perf_counter() - planning}
    made = make_plan(before, streamed, allowed, seconds)
    if failed:
        assert allowed is not None
        raise _budget_error(made, budget, allowed, held)
    return Compiled(captured, streamed.graph_module, made, run=streamed.graph_module)


def _budget_error(made: Plan, budget: Budget, allowed: int, held: int) -> MemoryBudgetError:
    account = "activations alone" if budget.share is not None else "weights, inputs and activations"
    extra = 0 if budget.share is not None else held
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
    if extra and held >= allowed + extra:
        message += f". Weights and inputs alone hold {format_bytes(held)}"
    message += (
        '. Ask for memory_budget="min", a larger budget, or a smaller input; the error\'s plan shows what holds it.'
    )
    return MemoryBudgetError(
        message, budget_bytes=allowed + extra, lowest_bytes=lowest, holders=made.after.holders, plan=made
    )
