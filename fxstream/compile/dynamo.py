"""Graphs as Dynamo gives them, planned: torch's own functions, with the parameters of modules among the inputs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import no_python_dispatcher
from torch._guards import CompileContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import _disable_current_modes

from fxstream.budget import Budget
from fxstream.errors import GradientError, MemoryBudgetError
from fxstream.passes.graph.call import Captured
from fxstream.passes.graph.capture import FRAME, capture
from fxstream.passes.graph.turns import turn
from fxstream.planned import normalized, plan_captured
from fxstream.report import Plan

_DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
"""What Dynamo makes of ``tensor.data``."""

WEIGHT = "lifted_weight_"
"""Begins the names of the weights that Dynamo passes as inputs, before their places among these."""


@dataclass(frozen=True)
class PlannedGraph:
    """One of Dynamo's graphs, rewritten: its placeholders are the inputs at ``places`` among Dynamo's own."""

    captured: Captured
    graph_module: fx.GraphModule
    places: tuple[int, ...]
    plan: Plan

    def pick(self, inputs: Sequence[Any]) -> list[Any]:
        """What the rewritten graph reads of Dynamo's inputs."""
        return [inputs[place] for place in self.places]


@turn()
def plan_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Any], budget: Budget, allow_recompute: bool = False
) -> PlannedGraph:
    """Capture and plan one of Dynamo's graphs for inputs like these; runs nothing.

    Where a shape or a number is a symbol of Dynamo's, it becomes what it is now, which Dynamo then guards.

    Raises ``MemoryBudgetError``, with the graph's number and the user's line that it begins at, and ``CaptureError``.
    """
    began = time.perf_counter()
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _disable_current_modes(), no_python_dispatcher():  # whose strides are not always those of a real view
        examples = [_static(x, fake) for x in inputs]
        with tracing(None):  # what is captured has no part in what Dynamo guards
            captured = capture(_Interpreted(graph_module, numbers(graph_module, inputs)), examples)
            _name_modules(captured.graph_module)
            places = [place for place, example in enumerate(examples) if isinstance(example, torch.Tensor)]
            weights = {place for place in places if _is_weight(placeholders[place])}
            _weights_out(captured.graph_module, [place if place in weights else None for place in places])
            try:
                planned = plan_captured(normalized(captured), budget, began, allow_recompute)
            except MemoryBudgetError as error:
                error.args = (f"{_where(graph_module)}: {error}",)
                raise
    order = _weights_in(planned.graph_module, [place for place in places if place not in weights])
    return PlannedGraph(captured, planned.graph_module, tuple(order), planned.plan)


def refuse_gradients(inputs: Sequence[Any], what: str) -> None:
    """Raise ``GradientError`` where autograd would record what is done with these inputs."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        raise GradientError(
            f"{what} runs inference only, but autograd is on and a parameter or an input requires a gradient: call it "
            "under torch.no_grad(), or call requires_grad_(False) first"
        )


def numbers(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, float]:
    """Python numbers that Dynamo passes as tensors, by the nodes that take them out."""
    places = {node: place for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder"))}
    found = {}
    for node in graph_module.graph.find_nodes(op="call_method", target="item"):
        symbol = node.meta.get("example_value")
        if node.args[0] in places and isinstance(symbol, torch.SymFloat) and symbol.node.has_hint():
            given = inputs[places[node.args[0]]]
            found[node] = float(given if type(given) is torch.Tensor else symbol)
    return found


class _Interpreted(nn.Module):
    """One of Dynamo's graphs, run node by node: its own code has its symbols in it."""

    def __init__(self, graph_module: fx.GraphModule, numbers: dict[fx.Node, float]) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.numbers = numbers

    def forward(self, *inputs: Any) -> Any:
        with preserve_node_meta():
            return _Interpreter(self.graph_module, self.numbers).run(*inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, numbers: dict[fx.Node, float]) -> None:
        super().__init__(graph_module)
        self.numbers = numbers

    def run_node(self, n: fx.Node) -> Any:
        return self.numbers[n] if n in self.numbers else super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What is written to ``tensor.data`` is written to the tensor, as a capture sees it of ``tensor.detach()``."""
        return args[0].detach() if target is _DATA else super().call_function(target, args, kwargs)


def _is_weight(placeholder: fx.Node) -> bool:
    """Whether Dynamo lifted a parameter or a buffer of a module here."""
    known = placeholder.meta.get("tensor_dict", {})
    return isinstance(placeholder.meta["example_value"], nn.Parameter) or "_dynamo_static_input_type" in known


def _static(example: Any, mode: FakeTensorMode) -> Any:
    """An example without its symbols: shapes are what they are now, which Dynamo then guards."""
    if isinstance(example, torch.Tensor):
        size, stride = map(int, example.shape), map(int, example.stride())
        with mode:
            return torch.empty_strided([*size], [*stride], dtype=example.dtype, device=example.device)
    return int(example) if isinstance(example, torch.SymInt) else example


def _name_modules(graph_module: fx.GraphModule) -> None:
    """Paths of modules from the compiled one on; Dynamo has them from a variable of the frame that called it."""
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            root = next(iter(stack.values()))[0]
            named = {key: (path.removeprefix(root).removeprefix("."), kind) for key, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = named


def _weights_out(graph_module: fx.GraphModule, places: Sequence[int | None]) -> None:
    """Let the placeholders that have a place be weights, as a captured module has them."""
    graph = graph_module.graph
    for node, place in zip(graph.find_nodes(op="placeholder"), places, strict=True):
        if place is None:
            continue
        name = f"{WEIGHT}{place}"
        graph_module.register_buffer(name, node.meta["val"], persistent=False)
        _replace(node, "get_attr", name)


def _weights_in(graph_module: fx.GraphModule, inputs: Sequence[int]) -> list[int]:
    """The inverse: let them be placeholders again. Returns the place of each placeholder."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="get_attr"):
        if node.target.startswith(WEIGHT):
            _replace(node, "placeholder", node.target)
    others = iter(inputs)
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    return [int(name.removeprefix(WEIGHT)) if name.startswith(WEIGHT) else next(others) for name in names]


def _replace(node: fx.Node, op: str, target: str) -> None:
    with node.graph.inserting_before(node):
        other = node.graph.create_node(op, target)
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _where(graph_module: fx.GraphModule) -> str:
    """Which of Dynamo's graphs this is: its number, and the user's line that it begins at."""
    frames = [FRAME.findall(node.meta.get("stack_trace") or "") for node in graph_module.graph.nodes]
    first = next((":".join(found[-1]) for found in frames if found), "")
    return f"in the graph {CompileContext.current_compile_id()} of torch.compile" + (f", from {first}" if first else "")
