"""What torch.compile sees of a streamed module: one operator, which runs the streamed graph.

Dynamo traces the user's model into the graph of a region, with all that it guards, and looks no further. Whoever traces
the call of the region, as AOTAutograd does for Inductor, meets the operator: a compiler that saw the loops would fuse
their slices, and copy their outputs for each store into them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, getitem
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx
from torch._dynamo import list_backends
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import higher_order_ops
from torch._higher_order_ops.base_hop import BaseHOP
from torch.library import custom_op
from torch.utils._python_dispatch import _disable_current_modes

from fxstream.compile.dynamo import PlannedGraph, numbers, plan_graph, refuse_gradients
from fxstream.compile.regions import REGIONS
from fxstream.compiled import BACKEND, compile_by
from fxstream.passes.graph.liveness import Liveness, analyze
from fxstream.passes.graph.turns import turn
from fxstream.passes.rewriting.lower import identity, is_view
from fxstream.runtime.autocast import without_autocast

STREAMED = "fxstream"
"""Under which a region's graph has what became of it."""


@dataclass(eq=False)
class Streamed:
    """The graph that runs a region for inputs of some shapes, and fake values of what it gives.

    It goes by its key, which is made of what it computes and how, so that a compiler's cache tells two budgets apart.
    """

    run: fx.GraphModule
    values: tuple[torch.Tensor, ...]
    key: str


_STREAMED: WeakValueDictionary[str, Streamed] = WeakValueDictionary()


@custom_op("fxstream::streamed", mutates_args=())
def streamed(tensors: Sequence[torch.Tensor], key: str) -> list[torch.Tensor]:
    """Run the graph that goes by ``key`` on its inputs."""
    with torch.no_grad(), without_autocast():
        return list(_STREAMED[key].run(*tensors))


@streamed.register_fake
def _(tensors: Sequence[torch.Tensor], key: str) -> list[torch.Tensor]:
    values = _STREAMED[key].values
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in values]


class StreamedRegion(BaseHOP):
    """``region(function, token=token)``: the function, streamed as the module that is known by the token asks.

    Under Dynamo the function's tensors are lifted, and its graph is what the call gets. Other such operators keep that
    graph for the compiler; this one is traced as the operator that runs it streamed.
    """

    def __init__(self) -> None:
        super().__init__("fxstream_region")

    def __call__(self, graph_module: Any, *operands: Any, token: int) -> Any:
        if not isinstance(graph_module, fx.GraphModule):  # Dynamo has no graph of it, and calls it as it is
            return torch.compiler.disable(graph_module)()
        made = graph_module.meta.setdefault(STREAMED, {})
        known = (
            *(tuple(map(int, x.shape)) if isinstance(x, torch.Tensor) else int(x) for x in operands),
            *numbers(graph_module, operands).values(),
        )
        if known not in made:
            backend = _surrounding()
            if backend == BACKEND:  # which has a budget of its own
                return graph_module(*operands)
            made[known] = _stream(graph_module, operands, backend, token)
        planned, runs, views = made[known]
        tensors = planned.pick(operands)
        return planned.captured.result(views(*tensors, *torch.ops.fxstream.streamed(tensors, runs.key)))


class _RegionVariable(higher_order_ops.BaseHOPVariable):
    """A region as Dynamo traces it: its results may be views of each other and of its inputs."""

    supports_aliasing = True


region = StreamedRegion()
higher_order_ops._hop_name_to_variable_class[region.name()] = _RegionVariable


@turn()
def _stream(
    graph_module: fx.GraphModule, operands: Sequence[Any], backend: str, token: int
) -> tuple[PlannedGraph, Streamed, fx.GraphModule]:
    owner = REGIONS[token]
    refuse_gradients(operands, "a streamed module")
    planned = plan_graph(graph_module, operands, owner.budget, owner.allow_recompute)
    views = _views_apart(planned.graph_module)
    compiler = owner.backend or backend
    key = _key(planned.graph_module, compiler)
    made = _STREAMED.get(key)
    if made is None:
        values = tuple(node.meta["val"] for node in planned.graph_module.graph.output_node().args[0])
        made = _STREAMED[key] = Streamed(compile_by(compiler, planned.graph_module), values, key)
    owner.plans.append(planned.plan)
    owner.graphs.append(made)  # what was compiled knows it by its key alone
    return planned, made, views


def _views_apart(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Take the views from a graph's outputs; what is returned makes them, of the graph's inputs and its new outputs.

    What an operator returns shares no memory with its inputs, nor with what else it returns.
    """
    graph, liveness = graph_module.graph, analyze(graph_module)
    inputs, output = graph.find_nodes(op="placeholder"), graph.output_node()
    results: Any = output.args[0]
    views, made = set[fx.Node](), dict[fx.Node, None]()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if _is_view(liveness, node):
            views.add(node)
            waiting.extend(node.all_input_nodes)
        elif node.op != "placeholder":
            made[node] = None
    apart, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*inputs, *made):
        env[node] = apart.placeholder(node.name)
    for node in graph.nodes:
        if node in views:
            env[node] = apart.node_copy(node, env.__getitem__)
    apart.output(tuple(env[node] for node in results))
    output.args = (tuple(made),)
    for node in reversed(graph.nodes):
        if node in views and not node.users:
            graph.erase_node(node)
    graph_module.recompile()
    return fx.GraphModule({}, apart, class_name="Views")


def _is_view(liveness: Liveness, node: fx.Node) -> bool:
    if node.target is getitem:
        return _is_view(liveness, node.all_input_nodes[0])
    return node.op == "call_function" and is_view(liveness, node)


def _key(graph_module: fx.GraphModule, compiler: str) -> str:
    digest = hashlib.sha256(f"{compiler} {identity(graph_module)}".encode())
    with _disable_current_modes():
        for node in graph_module.graph.find_nodes(op="get_attr"):  # constants; weights are inputs here
            value = attrgetter(str(node.target))(graph_module).detach().cpu()
            digest.update(bytes(value.clone().untyped_storage()))
    return digest.hexdigest()


def _surrounding() -> str:
    """The backend that torch.compile was called with, for what is compiled of the region: "eager" if it has no name."""
    try:
        compiler = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # run, not traced
        return "eager"
    name = getattr(compiler, "__name__", "")
    return name if name in list_backends(exclude_tags=()) else "eager"
