"""The backend of torch.compile: ``torch.compile(model, backend="fxstream", options={"memory_budget": "6GiB"})``.

It is found through its entry point, without an import of fxstream. Each graph that Dynamo gives is planned by itself:
captured as ATen operators, streamed within the budget, and handed with its loops to an inner backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxstream.budget import Budget
from fxstream.compile.dynamo import plan_graph, refuse_gradients
from fxstream.compiled import check_compiler, compile_by
from fxstream.runtime.autocast import without_autocast

OPTIONS = ("memory_budget", "inner", "allow_recompute")


def fxstream(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs within a memory budget, for inference.

    Of ``options``, ``memory_budget`` and ``allow_recompute`` are as for ``fxstream.optimize``, and the first has to be
    given; ``inner`` names the backend that compiles what was streamed, ``"inductor"`` unless given.

    Raises ``ValueError`` (an unknown option or inner backend, a budget that can't be read), ``MemoryBudgetError``
    (a graph can't be run within the budget) and ``GradientError`` (autograd would record), which torch.compile gives
    as the ``inner_exception`` of its ``BackendCompilerFailed``.
    """
    budget, inner, allow_recompute = _read(options or {}, mode)
    refuse_gradients(example_inputs, "the backend fxstream")
    symbolic = [node.meta["example_value"] for node in graph_module.graph.find_nodes(op="placeholder")]
    planned = plan_graph(graph_module, symbolic, budget, allow_recompute)
    run = compile_by(inner, planned.graph_module)

    def call(*inputs: Any) -> Any:
        with without_autocast():
            return planned.captured.result(run(*planned.pick(inputs)))

    return call


def _read(options: Mapping[str, Any], mode: str | None) -> tuple[Budget, str, bool]:
    """What options ask for: the budget, the inner backend, and whether values may be computed again."""
    if mode is not None:
        raise ValueError(f"the backend fxstream has no mode {mode!r}: use options={{'memory_budget': ...}}")
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"the backend fxstream has no option {unknown[0]!r}: its options are {', '.join(OPTIONS)}")
    if "memory_budget" not in options:
        raise ValueError("the backend fxstream needs the option 'memory_budget': a size, a share, or 'min'")
    inner = check_compiler(options.get("inner", "inductor"), "inner")
    return Budget.parse(options["memory_budget"]), inner, bool(options.get("allow_recompute"))
