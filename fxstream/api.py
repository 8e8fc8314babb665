"""What a user calls: ``plan`` and ``optimize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fxstream.budget import Budget
from fxstream.disk import Disk, Store
from fxstream.errors import CaptureError
from fxstream.model import optimize_model
from fxstream.passes.graph.capture import owner
from fxstream.planned import compile_call
from fxstream.rehash.settings import StepRehash


def plan(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    memory_budget: str | int | float = "min",
    allow_recompute: bool = False,
    offload: str | None = None,
    **call: Any,
) -> Any:
    """Plan one call of a module, or of a bound method of one. Runs nothing, changes nothing. Returns a ``Plan``.

    ``args`` and ``kwargs`` are example inputs; they and the weights may be fake or on the meta device.
    ``memory_budget``, ``allow_recompute`` and ``offload`` are as for ``optimize``.

    A diffusers pipeline is planned for the call with the arguments ``call``, such as ``height``, ``width`` and
    ``num_frames``: a ``PipelinePlan``. Without any, it is what an optimized pipeline has planned so far.

    Raises ``ValueError`` (the budget can't be read, the inputs don't fit the model's signature), ``CaptureError`` (the
    model can't be captured as one graph) and ``MemoryBudgetError`` (no plan meets the budget).
    """
    budget, disk = Budget.parse(memory_budget), Disk.parse(offload)
    if is_pipeline(model):
        from fxstream.pipeline.pipeline import plan_pipeline

        keywords = {"budget": budget, "allow_recompute": allow_recompute}
        return plan_pipeline(model, keywords, _named(args, kwargs, call), disk)
    _refuse(call, "plan", model)
    return compile_call(model, args, kwargs or {}, budget, allow_recompute, disk=disk).plan


def optimize(
    model: Any,
    memory_budget: str | int | float,
    example_args: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    allow_recompute: bool = False,
    step_rehash: StepRehash | None = None,
    compile: str | None = None,
    offload: str | None = None,
    fullgraph: bool = False,
    **call: Any,
) -> Any:
    """A module that stands where ``model`` stood, and computes the same within a memory budget.

    ``memory_budget`` is all that a call may hold (weights, inputs and activations) as ``"6GiB"`` or an int of bytes;
    or a float in (0, 1), the share of the captured graph's activation peak; or ``"min"``, the lowest reachable.
    ``allow_recompute`` lets large values be computed again where holding them would break the budget; the plan tells
    how many operations that adds.

    ``compile`` names a backend of torch.compile, such as ``"inductor"``, that compiles what is planned: the loops'
    bodies, each once, and what is between the loops.

    With ``offload="disk"`` or ``"disk:FOLDER"`` weights may live on disk, and are read ahead of their use into memory
    that is freed after it: the budget holds for activations and the weights that are in memory together (a share is of
    the activation peak and all weights). A weight that is mapped from a file, as ``from_pretrained`` and
    ``torch.load(mmap=True)`` leave it, is read from that; of the others, those that are to be read are moved to a file
    without a name in the folder, which is gone when they are. On the CPU alone.

    A call that is no single graph, as a branch depends on data, runs as the model's own code, and the largest of its
    submodules that are one graph are streamed, each within the budget; a warning says so. With ``fullgraph`` it is a
    ``CaptureError``.

    With example inputs the model is captured and planned now, else at the first call. The weights are shared with
    ``model``, not copied. Inference only. Raises as ``plan`` does; nothing is changed then.

    With ``step_rehash`` some denoising steps are skipped: the result is a ``RehashedModule``, and no longer exact. What
    is held between steps counts in the budget. Raises ``ValueError`` where the cut can't be made. Of a pipeline, the
    denoisers skip steps.

    A diffusers pipeline is changed in place and returned: its denoisers, and what its VAE offers of ``encode`` and
    ``decode``, become stages, each of which may hold ``memory_budget`` together with the other components. With
    ``call``, arguments of the pipeline's call such as ``height``, ``width`` and ``num_frames``, all stages are planned
    now. With ``offload`` the weights of all components live on disk, and text and image encoders become stages, too: a
    stage holds those of its own weights that stay by its plan. ``restore`` undoes it; weights stay where they are.
    """
    budget, disk = Budget.parse(memory_budget), Disk.parse(offload)
    if not isinstance(step_rehash, StepRehash | None):
        raise TypeError(f"step_rehash={step_rehash!r} is no StepRehash: give StepRehash(...)")
    backend = None
    if compile is not None:
        from fxstream.compiled import check_compiler  # and with it Dynamo, which takes seconds

        backend = check_compiler(compile, "compile")
    if step_rehash is not None and disk is not None:
        raise ValueError("offload= does not go with Step Rehash yet: leave out one of them")
    if is_pipeline(model):
        from fxstream.pipeline.pipeline import optimize_pipeline

        keywords = {
            "budget": budget,
            "allow_recompute": allow_recompute,
            "backend": backend,
            "step_rehash": step_rehash,
            "fullgraph": fullgraph,
        }
        return optimize_pipeline(model, keywords, _named(example_args, example_kwargs, call), disk)
    _refuse(call, "optimize", model)
    store = None if disk is None else Store(disk, lambda: [owner(model)[0]])
    streamed = optimize_model(model, budget, allow_recompute, step_rehash, backend, store=store, fullgraph=fullgraph)
    if example_args is not None or example_kwargs is not None:
        try:
            streamed.prepare(*(example_args or ()), **(example_kwargs or {}))
        except CaptureError as error:
            if not streamed.runs_without_graph(error):
                raise
    return streamed


def restore(pipeline: Any) -> Any:
    """Give a pipeline back the components, and their own memory switches, that ``optimize`` replaced; returns it."""
    if not is_pipeline(pipeline):
        raise TypeError(f"expected a pipeline, got {type(pipeline).__name__}: a streamed module's model is as it was")
    from fxstream.pipeline.pipeline import restore_pipeline

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
