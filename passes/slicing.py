"""Slicing: rewrite each chosen group into one ``SlicedLoop`` node.

What does not depend on the slice is hoisted before the loop. The loop's outputs are the storages that outlive it, each
preallocated, or written over an input that dies in the loop where the two lie at the same addresses slice by slice.
Views that outlive the loop are taken again of the whole outputs, after it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxstream.loop import Output, Slice, SlicedLoop
from fxstream.passes.axes import with_arguments
from fxstream.passes.capture import ROOT, share_weights
from fxstream.passes.grouping import Group
from fxstream.passes.liveness import analyze
from fxstream.passes.normalize import is_impure
from fxstream.passes.program import Program
from fxstream.passes.propagate import evaluate
from fxstream.passes.split_norms import fuse_norms

aten = torch.ops.aten

PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default}
"""Matrix products, which run as many small ones where their rows do not lie together: they read packed windows."""

LoopInput = tuple[fx.Node, "Slice | None"]


class Slicer:
    """Rewrites groups of one program; a loop once built is kept, so that plans can be tried."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._loops: dict[tuple[int, int, int, tuple[int, ...]], Loop] = {}

    def loop(self, group: Group) -> Loop:
        """The loop of one group."""
        key = (id(group.run), group.start, group.end, group.lengths)
        if key not in self._loops:
            self._loops[key] = _loop(self.program, group)
        return self._loops[key]

    def rewrite(self, groups: Sequence[Group]) -> fx.GraphModule:
        """A new graph module that computes what the program's does, with a loop in place of each group.

        The program's graph is left as it is; weights are shared.
        """
        source = self.program.graph_module
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        modules: dict[str, SlicedLoop] = {}
        moved: set[fx.Node] = set()  # nodes whose storages are not those of the program's
        by_start = {group.start: group for group in groups}
        done = -1
        for node in source.graph.nodes:
            index = self.program.position.get(node, done + 1)
            if index <= done:
                continue
            if index in by_start and node in self.program.position:
                group = by_start[index]
                name = f"loop_{len(modules)}"
                modules[name] = self.loop(group).module
                self._emit(self.loop(group), name, graph, env, moved)
                done = group.end
            else:
                self._copy(node, graph, env, moved)
        graph.eliminate_dead_code(is_impure)
        sliced = fx.GraphModule({**_attributes(source), **modules}, graph, class_name="Streamed")
        root = getattr(source, ROOT, None)
        if root is not None:
            share_weights(sliced, root)
        fuse_norms(sliced)
        return sliced

    def _copy(self, node: fx.Node, graph: fx.Graph, env: dict[fx.Node, fx.Node], moved: set[fx.Node]) -> None:
        """Copy a node as it is; a view of what a loop has made shares its storage."""
        copy = env[node] = graph.node_copy(node, env.__getitem__)
        index = self.program.position.get(node, -1)
        if index >= 0 and self.program.is_view(index) and any(read in moved for read in copy.all_input_nodes):
            with self.program.mode:
                copy.meta["val"] = evaluate(copy)
            moved.add(copy)

    def _emit(self, loop: Loop, name: str, graph: fx.Graph, env: dict[fx.Node, fx.Node], moved: set[fx.Node]) -> None:
        program, group, nodes = self.program, loop.group, self.program.liveness.schedule
        inside = range(group.start, group.end + 1)
        body = [index for index in inside if index in group.run.slices]
        for index in inside:
            if index not in group.run.slices:
                self._copy(nodes[index], graph, env, moved)
        call = graph.create_node("call_module", name, tuple(env[node] for node, _ in loop.inputs), name=name)
        inputs = [env[node].meta["val"] for node, _ in loop.inputs]
        with program.mode:
            call.meta = {**nodes[body[-1]].meta, "val": tuple(out.allocate(inputs) for out in loop.module.outputs)}
        for position, node in enumerate(loop.outputs):
            env[node] = graph.call_function(operator.getitem, (call, position))
            env[node].meta = {**node.meta, "val": call.meta["val"][position]}
            moved.add(env[node])
        for index in body:
            if program.is_view(index) and all(read in env for read in nodes[index].all_input_nodes):
                self._copy(nodes[index], graph, env, moved)


@dataclass(frozen=True)
class Loop:
    """One group as a loop: its module, and the nodes of the program that are its arguments and its results."""

    group: Group
    module: SlicedLoop
    inputs: tuple[LoopInput, ...]
    outputs: tuple[fx.Node, ...]

    def body_bytes(self) -> dict[int, int]:
        """Length -> peak bytes inside a body of it, over the loop's inputs and outputs."""
        return {length: max(analyze(body).live_bytes(), default=0) for length, body in self.module.graphs().items()}


def _attributes(source: fx.GraphModule) -> dict[str, Any]:
    """What the graph's nodes refer to by name."""
    names = {str(node.target) for node in source.graph.nodes if node.op in ("get_attr", "call_module")}
    return {name: operator.attrgetter(name)(source) for name in names}


def _loop(program: Program, group: Group) -> Loop:
    nodes, run = program.liveness.schedule, group.run
    body = [index for index in range(group.start, group.end + 1) if index in run.slices]
    inputs = _inputs(program, group, body)
    over, outputs = group.candidate.over, group.candidate.outputs
    where = {node: position for position, (node, _) in enumerate(inputs)}
    specs = []
    for index in outputs:
        value = nodes[index].meta["val"]
        target = where[over[index]] if index in over else None
        layout = (tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
        specs.append(Output(run.slices[index], *layout, over=target))
    results = tuple(nodes[index] for index in outputs)
    bodies = {length: _body(program, group, body, inputs, results, length) for length in dict.fromkeys(group.lengths)}
    module = SlicedLoop(group.lengths, [piece for _, piece in inputs], specs, bodies)
    return Loop(group, module, tuple(inputs), results)


def _inputs(program: Program, group: Group, body: Sequence[int]) -> list[LoopInput]:
    """What the body reads from outside, and how."""
    inputs: dict[LoopInput, None] = {}
    for index in body:
        for node, piece in zip(program.values[index].reads, group.run.cuts[index].inputs, strict=True):
            if not _in_body(program, group, node):
                inputs[node, piece] = None
    return list(inputs)


def _in_body(program: Program, group: Group, node: fx.Node) -> bool:
    index = program.position.get(node, -1)
    return group.start <= index <= group.end and index in group.run.slices


def _body(
    program: Program,
    group: Group,
    body: Sequence[int],
    inputs: Sequence[LoopInput],
    outputs: Sequence[fx.Node],
    length: int,
) -> fx.GraphModule:
    """The graph that computes one slice of ``length`` steps: windows of the inputs -> slices of the outputs."""
    graph = fx.Graph()
    windows: dict[LoopInput, fx.Node] = {}
    parts: dict[LoopInput, fx.Node] = {}
    env: dict[fx.Node, fx.Node] = {}
    with torch.no_grad(), program.mode:
        for node, piece in inputs:
            window = graph.placeholder(node.name)
            window.target = window.name  # a value may be read in two ways
            value = node.meta["val"]
            window.meta = {**node.meta, "val": value if piece is None else piece.window(value, 0, length)}
            windows[node, piece] = window

        def read(node: fx.Node, piece: Slice | None, packed: bool) -> fx.Node:
            if _in_body(program, group, node):
                return env[node]
            window = windows[node, piece]
            if (node, piece) in parts:
                return parts[node, piece]
            if piece is not None and piece.outer > 1:
                shape = piece.resized(node.meta["val"].shape, length)
                part = graph.call_function(aten.reshape.default, (window, shape))
            elif piece is not None and packed and not window.meta["val"].is_contiguous():
                part = graph.call_function(aten.clone.default, (window,), {"memory_format": torch.contiguous_format})
            else:
                return window
            part.meta = {**node.meta, "val": evaluate(part)}
            parts[node, piece] = part
            return part

        for index in body:
            env[program.values[index].node] = _sliced_node(program, group, index, graph, read, length)
    graph.output(tuple(env[node] for node in outputs))
    graph.eliminate_dead_code(is_impure)
    module = fx.GraphModule({}, graph, class_name="Body")
    fuse_norms(module)
    return module


def _sliced_node(
    program: Program,
    group: Group,
    index: int,
    graph: fx.Graph,
    read: Callable[[fx.Node, Slice | None, bool], fx.Node],
    length: int,
) -> fx.Node:
    value, cut = program.values[index], group.run.cuts[index]
    pieces = iter(cut.inputs)
    leaves, spec = pytree.tree_flatten((value.node.args, dict(value.node.kwargs)))
    packed = value.node.target in PRODUCTS
    leaves = [read(leaf, next(pieces), packed) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    target = value.node.target
    if isinstance(target, OpOverload):
        args, kwargs = with_arguments(target, args, kwargs, cut.resize(length))
    node = graph.create_node("call_function", target, args, kwargs, name=value.node.name)
    node.meta = dict(value.node.meta)
    if target in (aten.view.default, aten._unsafe_view.default):
        _evaluate_view(node)
    else:
        node.meta["val"] = evaluate(node)
    return node


def _evaluate_view(node: fx.Node) -> None:
    """A view of a window may not exist where one of the whole does: then it is a reshape, which copies."""
    try:
        node.meta["val"] = evaluate(node)
    except (RuntimeError, ValueError):
        node.target = aten.reshape.default
        node.meta["val"] = evaluate(node)
