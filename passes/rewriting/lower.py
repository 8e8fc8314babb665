"""Lower: a rewritten graph with what a compiler is given compiled: its pieces, and the bodies of its loops.

Each is compiled by itself, and once: repeated blocks share what is compiled of them. The graph around them runs as it
was planned, and so does a loop: slice by slice into the one output, which no compiler sees.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx, nn
from torch._ops import OpOverload

from fxstream.passes.graph.capture import ROOT, share_weights
from fxstream.passes.graph.liveness import Liveness, analyze, tensors_of
from fxstream.passes.rewriting.pieces import find_pieces
from fxstream.runtime.loop import SlicedLoop

GraphCompiler = Callable[[fx.GraphModule], Callable[..., Any]]
"""Compiles a graph whose placeholders carry fake values; the result takes and gives what the graph does."""


class CompiledPart(nn.Module):
    """A graph, compiled; what it returns is laid out as planned, which is what other parts were compiled for."""

    def __init__(self, run: Callable[..., Any], values: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.run = run
        self.layouts = [(value.shape, value.stride()) for value in values]

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """As ``forward``: hooks of all modules are for the user's."""
        return self.forward(*tensors)

    def forward(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        results = self.run(*tensors)
        return [_laid_out(result, *layout) for result, layout in zip(results, self.layouts, strict=True)]


def _laid_out(tensor: torch.Tensor, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """The tensor with these strides, copied where it has to be; Inductor takes liberties where a size is one."""
    if all(size == 1 or a == b for size, a, b in zip(shape, tensor.stride(), strides, strict=True)):
        return tensor if tensor.stride() == strides else tensor.as_strided(shape, strides)
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


_PARTS: WeakValueDictionary[str, CompiledPart] = WeakValueDictionary()
"""What is compiled, by the compiler and the identity of the graph."""


class Lowering:
    """Lowers graphs by ``compile_graph``, which is called ``compiler``."""

    def __init__(self, compiler: str, compile_graph: GraphCompiler) -> None:
        self.compiler = compiler
        self.compile_graph = compile_graph

    def lower(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """A new graph module that computes the same, of a graph whose nodes carry fake values; weights are shared."""
        liveness = analyze(graph_module)
        pieces = {piece.start: piece for piece in find_pieces(liveness)}
        position = {node: index for index, node in enumerate(liveness.schedule)}
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        modules: dict[str, Any] = {}
        done = -1
        for node in graph_module.graph.nodes:
            index = position.get(node, -1)
            if node.op == "get_attr":
                modules[str(node.target)] = operator.attrgetter(str(node.target))(graph_module)
            elif node.op == "call_module":
                modules[str(node.target)] = self._loop(graph_module.get_submodule(str(node.target)))
            elif index in pieces:
                self._emit(liveness, pieces[index], graph, env, modules)
                done = pieces[index].stop - 1
            if index < 0 or index > done:
                env[node] = graph.node_copy(node, env.__getitem__)
        lowered = fx.GraphModule(modules, graph, class_name="Lowered")
        root = getattr(graph_module, ROOT, None)
        if root is not None:
            share_weights(lowered, root)
        return lowered

    def _loop(self, loop: nn.Module) -> SlicedLoop:
        assert isinstance(loop, SlicedLoop)
        return loop.with_bodies({name: self._body(body) for name, body in loop.bodies.items()})

    def _body(self, body: nn.Module) -> nn.Module:
        """A body at once, or as a graph of its own where it has loops."""
        assert isinstance(body, fx.GraphModule)
        return self.lower(body) if body.graph.find_nodes(op="call_module") else self._part(body)

    def _part(self, graph_module: fx.GraphModule) -> CompiledPart:
        key = f"{self.compiler} {identity(graph_module)}"
        part = _PARTS.get(key)
        if part is None:
            results: Any = graph_module.graph.output_node().args[0]
            values = [node.meta["val"] for node in results]
            part = _PARTS[key] = CompiledPart(self.compile_graph(graph_module), values)
        return part

    def _emit(
        self,
        liveness: Liveness,
        piece: range,
        graph: fx.Graph,
        env: dict[fx.Node, fx.Node],
        modules: dict[str, Any],
    ) -> None:
        """A piece, as a call of what it is compiled to; views of what is outside are taken outside."""
        nodes = []
        for node in liveness.schedule[piece.start : piece.stop]:
            if all(read in env for read in node.all_input_nodes) and is_view(liveness, node):
                env[node] = graph.node_copy(node, env.__getitem__)
            else:
                nodes.append(node)
        body, inputs, outputs = _extract(nodes)
        if not outputs:
            return
        name = f"piece_{piece.start}"
        modules[name] = self._part(body)
        call = graph.call_module(name, tuple(env[read] for read in inputs))
        for place, node in enumerate(outputs):
            env[node] = graph.call_function(operator.getitem, (call, place))


def is_view(liveness: Liveness, node: fx.Node) -> bool:
    """Whether all that a node of the schedule gives lies in storages of others."""
    return all(liveness.storages[storage].node is not node for storage in liveness.of[node])


def _extract(nodes: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """Nodes that follow each other as a graph by itself, with what it reads of others and what these read of it."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(read for node in nodes for read in node.all_input_nodes if read not in inside))
    outputs = [node for node in nodes if not inside.issuperset(node.users)]
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for read in inputs:
        env[read] = graph.placeholder(read.name)
        env[read].meta = dict(read.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    return fx.GraphModule({}, graph, class_name="Piece"), inputs, outputs


def identity(graph_module: fx.GraphModule) -> str:
    """A digest that is equal for graphs that compute the same in the same way, whatever their nodes are called."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph_module.graph.nodes)}
    lines = []
    for node in graph_module.graph.nodes:
        target: Any = node.op if node.op in ("placeholder", "output") else node.target
        if node.op == "call_module":
            target = _loop_identity(graph_module.get_submodule(str(node.target)))
        elif callable(target) and not isinstance(target, OpOverload):
            target = f"{target.__module__}.{target.__qualname__}"
        named: Mapping[fx.Node, Any] = {read: _Named(numbers[read]) for read in node.all_input_nodes}
        operands = fx.map_arg((node.args, dict(node.kwargs)), named.__getitem__)
        layouts = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors_of(node.meta.get("val"))]
        lines.append(f"{target} {operands} {layouts if node.op in ('placeholder', 'get_attr') else ''}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _loop_identity(loop: nn.Module) -> str:
    """What a loop cuts and how, and its bodies."""
    assert isinstance(loop, SlicedLoop)
    fields = {name: value for name, value in vars(loop).items() if not name.startswith("_") and name != "training"}
    bodies = {name: identity(body) for name, body in loop.bodies.items() if isinstance(body, fx.GraphModule)}
    return f"{fields} {bodies}"


class _Named:
    """Prints as a node's number."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name
