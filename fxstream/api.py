"""What a user calls: ``plan`` and ``optimize``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxstream.budget import Budget, Resident, format_bytes
from fxstream.errors import MemoryBudgetError
from fxstream.module import Check, Region, StreamedModule, always
from fxstream.passes.capture import Captured, Inputs, capture
from fxstream.passes.internal import internal_errors
from fxstream.passes.liveness import MemoryProfile, profile
from fxstream.passes.normalize import normalize
from fxstream.passes.stream import stream
from fxstream.rehash import RehashedModule, StepRehash
from fxstream.report import Plan, make_plan
from fxstream.steps import StepGraphs, places


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


def plan(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    memory_budget: str | int | float = "min",
    allow_recompute: bool = False,
    **call: Any,
) -> Any:
    """Plan one call of a module, or of a bound method of one. Runs nothing, changes nothing. Returns a ``Plan``.

    ``args`` and ``kwargs`` are example inputs; they and the weights may be fake or on the meta device.
    ``memory_budget`` and ``allow_recompute`` are as for ``optimize``.

    A diffusers pipeline is planned for the call with the arguments ``call``, such as ``height``, ``width`` and
    ``num_frames``: a ``PipelinePlan``. Without any, it is what an optimized pipeline has planned so far.

    Raises ``ValueError`` (the budget can't be read, the inputs don't fit the model's signature), ``CaptureError`` (the
    model can't be captured as one graph) and ``MemoryBudgetError`` (no plan meets the budget).
    """
    budget = Budget.parse(memory_budget)
    if is_pipeline(model):
        from fxstream.pipeline import plan_pipeline

        keywords = {"memory_budget": memory_budget, "allow_recompute": allow_recompute}
        return plan_pipeline(model, keywords, _named(args, kwargs, call))
    _refuse(call, "plan", model)
    return compile_call(model, args, kwargs or {}, budget, allow_recompute).plan


def optimize(
    model: Any,
    memory_budget: str | int | float,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    allow_recompute: bool = False,
    step_rehash: StepRehash | None = None,
    compile: str | None = None,
    resident: Callable[[Sequence[torch.Tensor]], Resident] | None = None,
    **call: Any,
) -> Any:
    """A module that stands where ``model`` stood, and computes the same within a memory budget.

    ``memory_budget`` is all that a call may hold (weights, inputs and activations) as ``"6GiB"`` or an int of bytes;
    or a float in (0, 1), the share of the captured graph's activation peak; or ``"min"``, the lowest reachable.
    ``allow_recompute`` lets large values be computed again where holding them would break the budget; the plan tells
    how many operations that adds.

    ``compile`` names a backend of torch.compile, such as ``"inductor"``, that compiles what is planned: the loops'
    bodies, each once, and what is between the loops.

    With example inputs the model is captured and planned now, else at the first call. The weights are shared with
    ``model``, not copied. Inference only. Raises as ``plan`` does; nothing is changed then.

    With ``step_rehash`` some denoising steps are skipped: the result is a ``RehashedModule``, and no longer exact. What
    is held between steps counts in the budget. Raises ``ValueError`` where the cut can't be made. Of a pipeline, the
    denoisers skip steps.

    ``resident``, given a call's input tensors, says what the device holds beside them and the activations; by itself a
    module is taken to be alone there with the weights that the call uses.

    A diffusers pipeline is changed in place and returned: its denoisers, and what its VAE offers of ``encode`` and
    ``decode``, become stages, each of which may hold ``memory_budget`` together with the other components. With
    ``call``, arguments of the pipeline's call such as ``height``, ``width`` and ``num_frames``, all stages are planned
    now. ``restore`` undoes it.
    """
    budget = Budget.parse(memory_budget)
    if not isinstance(step_rehash, StepRehash | None):
        raise TypeError(f"step_rehash={step_rehash!r} is no StepRehash: give StepRehash(...)")
    backend = None
    if compile is not None:
        from fxstream.compiled import check_compiler  # and with it Dynamo, which takes seconds

        backend = check_compiler(compile, "compile")
    if is_pipeline(model):
        from fxstream.pipeline import optimize_pipeline

        keywords = {
            "memory_budget": memory_budget,
            "allow_recompute": allow_recompute,
            "compile": compile,
            "step_rehash": step_rehash,
        }
        return optimize_pipeline(model, keywords, _named(example_args, example_kwargs, call))
    _refuse(call, "optimize", model)

    def compiler(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
        held = None if resident is None else resident(Inputs.of(args, kwargs).tensors)
        return compile_call(model, args, kwargs, budget, allow_recompute, held, backend)

    def fits(compiled: Any, tensors: Sequence[torch.Tensor]) -> bool:
        if resident is None or compiled.resident is None or budget.total_bytes is None:
            return True
        held, made = resident(tensors).bytes, compiled.plan
        return held <= max(compiled.resident.bytes, budget.total_bytes - made.input_bytes - made.peak_bytes)

    streamed: StreamedModule
    if step_rehash is not None:
        streamed = rehash_module(model, budget, step_rehash, allow_recompute, backend, resident, fits)
    else:
        streamed = StreamedModule(model, compiler, Region(budget, backend, allow_recompute), fits)
    if example_args is not None or example_kwargs is not None:
        streamed.prepare(*(example_args or ()), **(example_kwargs or {}))
    return streamed


def restore(pipeline: Any) -> Any:
    """Give a pipeline back the components, and their own memory switches, that ``optimize`` replaced; returns it."""
    if not is_pipeline(pipeline):
        raise TypeError(f"expected a pipeline, got {type(pipeline).__name__}: a streamed module's model is as it was")
    from fxstream.pipeline import restore_pipeline

    return restore_pipeline(pipeline)


def is_pipeline(model: Any) -> bool:
    """Whether this is a pipeline as diffusers has them: something to call that is made of components."""
    return callable(model) and not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), dict)


def _named(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call."""
    if args:
        raise TypeError("the arguments of a pipeline's call are given by name: height=, width=, num_frames= ...")
    return {**(kwargs or {}), **call}


def _refuse(call: Mapping[str, Any], function: str, model: Any) -> None:
    for name in call:
        raise TypeError(
            f"{function}() got an unexpected keyword argument {name!r}: a {type(model).__name__} is no pipeline"
        )


def compile_call(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    budget: Budget,
    allow_recompute: bool = False,
    resident: Resident | None = None,
    backend: str | None = None,
) -> Compiled:
    """Capture, plan and rewrite one call; compile it by ``backend`` if there is one."""
    began = time.perf_counter()
    planned = plan_captured(capture(model, args, kwargs), budget, began, allow_recompute, resident)
    return replace(planned, run=_compiled(backend, planned.graph_module))


def rehash_module(
    model: Callable[..., Any],
    budget: Budget | None,
    rehash: StepRehash,
    allow_recompute: bool = False,
    backend: str | None = None,
    resident: Callable[[Sequence[torch.Tensor]], Resident] | None = None,
    fits: Check = always,
) -> RehashedModule:
    """A module that skips steps; without a budget its graphs run as they were captured."""

    def compiler(args: Sequence[Any], kwargs: Mapping[str, Any]) -> StepGraphs:
        if rehash.calibration is not None:
            rehash.calibration.check_model(model)
        latent, timestep = places(model, args, kwargs, rehash.timestep)
        began = time.perf_counter()
        held = None if resident is None else resident(Inputs.of(args, kwargs).tensors)
        captured = capture(model, args, kwargs)
        with internal_errors("normalizing", captured.graph_module):
            normalize(captured.graph_module)
        before, seconds = profile(captured.graph_module), time.perf_counter() - began

        def fit(graph_module: fx.GraphModule, held_bytes: int) -> tuple[Callable[..., Any], Plan]:
            fitted, made = fit_graph(graph_module, budget, seconds, allow_recompute, held, held_bytes, before)
            return _compiled(backend, fitted), made

        graphs = StepGraphs(captured, latent, timestep, rehash, fit, held)
        graphs.planned(1)
        return graphs

    return RehashedModule(model, compiler, rehash, fits)


def plan_captured(
    captured: Captured,
    budget: Budget,
    began: float,
    allow_recompute: bool = False,
    resident: Resident | None = None,
) -> Compiled:
    """Plan and rewrite a captured call; ``began`` is when its capture did, by ``time.perf_counter``."""
    with internal_errors("normalizing", captured.graph_module):
        graph_module = normalize(captured.graph_module)
    fitted, made = fit_graph(graph_module, budget, time.perf_counter() - began, allow_recompute, resident)
    return Compiled(captured, fitted, made, fitted, resident)


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
    with internal_errors("planning", graph_module):
        streamed = stream(graph_module, allowed, allow_recompute)
        if allowed is not None and streamed.after.peak_bytes > allowed:
            streamed = stream(graph_module, None, allow_recompute)  # which may end within the budget
        made = make_plan(before, streamed, allowed, {"capture": seconds, "planning": time.perf_counter() - planning})
    if budget is not None and allowed is not None and streamed.after.peak_bytes > allowed:
        raise _budget_error(made, budget, allowed, held, held_bytes, resident)
    return streamed.graph_module, made


def _compiled(backend: str | None, graph_module: fx.GraphModule) -> Callable[..., Any]:
    if backend is None:
        return graph_module
    from fxstream.compiled import compile_by

    return compile_by(backend, graph_module)


def _budget_error(
    made: Plan, budget: Budget, allowed: int, held: int, cached: int, resident: Resident | None
) -> MemoryBudgetError:
    account = "activations alone" if budget.share is not None else "weights, inputs and activations"
    extra = cached if budget.share is not None else held + cached
    lowest = made.after.peak_bytes + extra
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
    if cached:
        message += f". Held between steps: {format_bytes(cached)}"
    if budget.share is None and held + cached >= allowed + extra:
        message += f". Weights and inputs alone hold {format_bytes(held)}"
    elif stage and budget.share is None:
        message += f". Beside its activations the pipeline holds {format_bytes(held + cached)}"
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
