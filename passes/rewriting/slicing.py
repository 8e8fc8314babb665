"""Slicing: rewrite each chosen group into one ``SlicedLoop`` node.

What does not depend on the slice is hoisted before the loop. The loop's outputs are the storages that outlive it, each
preallocated, or written over an input that dies in the loop where no later slice reads what a slice writes.
Views that outlive the loop are taken again of the whole outputs, after it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxstream.passes.graph.capture import graph_module_of, rebuilt
from fxstream.passes.graph.effects import stays
from fxstream.passes.graph.normalize import copies_more
from fxstream.passes.graph.propagate import evaluate, has_view
from fxstream.passes.operators.axes import Span, with_arguments
from fxstream.passes.planning.grouping import Group
from fxstream.passes.planning.program import Program, is_getitem
from fxstream.passes.planning.ranges import LoopInput, Ranges, infer_ranges, stored_part
from fxstream.passes.rewriting.split_norms import fuse_norms
from fxstream.runtime.loop import Output, Slice, SlicedLoop, Step

aten = torch.ops.aten

PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default}
"""Matrix products, which run as many small ones where their rows do not lie together: they read packed windows."""


def loop_name(number: int) -> str:
    """The name of a graph's loop node, counted along the schedule."""
    return f"loop_{number}"


class Slicer:
    """Rewrites groups of one program; a loop once built is kept, so that plans can be tried."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._loops: dict[Any, Loop] = {}

    def loop(self, group: Group) -> Loop:
        """The loop of one group."""
        key = (id(group.run), group.start, group.end, group.lengths, frozenset(group.candidate.over))
        if key not in self._loops:
            self._loops[key] = _loop(self.program, group)
        return self._loops[key]

    def rewrite(self, groups: Sequence[Group], others: Mapping[Group, SlicedLoop] | None = None) -> fx.GraphModule:
        """A new graph module that computes what the program's does, with a loop in place of each group.

        ``others`` are loops to put in place of those that were built. The program's graph is left as it is; weights are
        shared.
        """
        source = self.program.graph_module
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        modules: dict[str, nn.Module] = {}
        moved: set[fx.Node] = set()  # nodes whose storages are not those of the program's
        by_start = {group.start: group for group in groups}
        done = -1
        for node in source.graph.nodes:
            index = self.program.position.get(node, done + 1)
            if index <= done:
                continue
            if index in by_start and node in self.program.position:
                group = by_start[index]
                name = loop_name(len(modules))
                modules[name] = (others or {}).get(group, self.loop(group).module)
                self._emit(self.loop(group), name, graph, env, moved)
                done = group.end
            else:
                self._copy(node, graph, env, moved)
        graph.eliminate_dead_code(stays)
        sliced = rebuilt(source, graph, "Streamed", modules)
        if not self.program.at_home:  # all of a norm's input would be in memory
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


def _loop(program: Program, group: Group) -> Loop:
    nodes, run = program.liveness.schedule, group.run
    over, outputs = group.candidate.over, group.candidate.outputs
    sliced = [index for index in range(group.start, group.end + 1) if index in run.slices]
    wanted = infer_ranges(program, run, sliced, outputs, (0, group.lengths[0])).wanted
    body = [index for index in sliced if index in wanted]
    inputs = _inputs(program, group, body)
    where = {node: position for position, (node, _) in enumerate(inputs)}
    specs = []
    for index in outputs:
        value = nodes[index].meta["val"]
        target = where[over[index]] if index in over else None
        layout = (tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
        stride = None if target is None else tuple(over[index].meta["val"].stride())
        specs.append(Output(run.slices[index], *layout, over=target, over_stride=stride))
    builder = _Body(program, group, body, inputs, outputs)
    bodies: dict[str, fx.GraphModule] = {}
    known: dict[Any, str] = {}
    steps, start = [], 0
    for length in group.lengths:
        part = (start, start + length)
        ranges = infer_ranges(program, run, body, outputs, part)
        key = builder.key(ranges, part)
        if key not in known:
            known[key] = f"{length}" if f"{length}" not in bodies else f"{length}_{len(bodies)}"
            bodies[known[key]] = builder.build(ranges, part)
        reads = tuple(None if each[1] is None else _start_and_length(ranges.read[each]) for each in inputs)
        writes = tuple(stored_part(run.slices[index], run.extent, part)[0] for index in outputs)
        steps.append(Step(length, known[key], reads, writes))
        start += length
    module = SlicedLoop(steps, [piece for _, piece in inputs], specs, bodies)
    return Loop(group, module, tuple(inputs), tuple(nodes[index] for index in outputs))


def _start_and_length(span: Span) -> tuple[int, int]:
    return span[0], span[1] - span[0]


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


@dataclass
class _Body:
    """Builds the graphs that compute slices of one group: windows of the inputs -> slices of the outputs."""

    program: Program
    group: Group
    body: Sequence[int]
    inputs: Sequence[LoopInput]
    outputs: Sequence[int]

    def key(self, ranges: Ranges, part: Span) -> Any:
        """Equal for slices that one graph can compute."""
        found: list[Any] = [tuple(high - low for low, high in ranges.read.values())]
        for index, (low, high) in sorted(ranges.wanted.items()):
            value, cut = self.program.values[index], self.group.run.cuts[index]
            window = cut.window((low, high))
            arguments, first = cut.place((low, high), window)
            begins = [
                window[0] - self._wanted(ranges, node, piece)[0]
                for node, piece in zip(value.reads, cut.inputs, strict=True)
                if piece is not None
            ]
            found.append((high - low, low - first, repr(arguments), tuple(begins), window[1] - window[0]))
        for index in self.outputs:
            stored = stored_part(self.group.run.slices[index], self.group.run.extent, part)
            found.append((stored[0] - ranges.wanted[index][0], stored[1] - stored[0]))
        return tuple(found)

    def _wanted(self, ranges: Ranges, node: fx.Node, piece: Slice) -> Span:
        """The steps that a body has of a value that it reads."""
        if _in_body(self.program, self.group, node):
            return ranges.wanted[self.program.position[node]]
        return ranges.read[node, piece]

    def build(self, ranges: Ranges, part: Span) -> fx.GraphModule:
        """The graph for one slice, and all that have the same key."""
        graph, program, run = fx.Graph(), self.program, self.group.run
        env: dict[fx.Node, fx.Node] = {}
        windows: dict[LoopInput, fx.Node] = {}
        parts: dict[Any, fx.Node] = {}

        def read(node: fx.Node, piece: Slice | None, span: Span, packed: bool) -> fx.Node:
            """A value as an operator of the body reads it."""
            if piece is None:
                return windows[node, None]
            if (node, piece, span) in parts:
                return parts[node, piece, span]
            inside = _in_body(program, self.group, node)
            got = env[node] if inside else windows[node, piece]
            low, high = self._wanted(ranges, node, piece)
            if not inside and piece.outer > 1:
                shape = piece.resized(node.meta["val"].shape, high - low)
                got = _added(graph, node, aten.reshape.default, got, shape)
            found = _narrowed(graph, got, piece, span[0] - low, span[1] - span[0])
            if not inside and packed and not found.meta["val"].is_contiguous():
                found = _added(graph, node, aten.clone.default, found, memory_format=torch.contiguous_format)
            if found is not env.get(node) and found is not windows.get((node, piece)):
                parts[node, piece, span] = found
            return found

        with torch.no_grad(), program.mode:
            for node, piece in self.inputs:
                window = graph.placeholder(node.name)
                window.target = window.name  # a value may be read in two ways
                value = node.meta["val"]
                if piece is not None:
                    value = piece.window(value, 0, _start_and_length(ranges.read[node, piece])[1])
                window.meta = {**node.meta, "val": value}
                windows[node, piece] = window
            for index in self.body:
                if index in ranges.wanted:
                    env[program.values[index].node] = self._node(index, ranges, graph, read)
            results = []
            for index in self.outputs:
                low, high = stored_part(run.slices[index], run.extent, part)
                result, piece = env[program.values[index].node], run.slices[index]
                results.append(_narrowed(graph, result, piece, low - ranges.wanted[index][0], high - low))
        graph.output(tuple(results))
        graph.eliminate_dead_code(stays)
        module = graph_module_of(graph, {}, "Body")
        fuse_norms(module)
        return module

    def _node(self, index: int, ranges: Ranges, graph: fx.Graph, read: Callable[..., fx.Node]) -> fx.Node:
        """One operator on its slices: the part wanted of what it computes."""
        wanted, value, cut = ranges.wanted[index], self.program.values[index], self.group.run.cuts[index]
        pieces, window = iter(cut.inputs), cut.window(wanted)
        leaves, spec = pytree.tree_flatten((value.node.args, dict(value.node.kwargs)))
        target, packed = value.node.target, value.node.target in PRODUCTS
        leaves = [read(leaf, next(pieces), window, packed) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        first = wanted[0]
        if isinstance(target, OpOverload):
            arguments, first = cut.place(wanted, window)
            args, kwargs = with_arguments(target, args, kwargs, arguments)
        if copies_more(target, args):
            args = (_added(graph, args[0], aten.clone.default, args[0]), *args[1:])
        node = graph.create_node("call_function", target, args, kwargs, name=value.node.name)
        node.meta = dict(value.node.meta)
        if target in (aten.view.default, aten._unsafe_view.default) and not has_view(args[0].meta["val"], args[1]):
            node.target = aten.reshape.default  # of a window, which may have no view where the whole has one
        node.meta["val"] = evaluate(node)
        piece = self.group.run.slices[index]
        if is_getitem(value.node):
            first = self._wanted(ranges, value.reads[0], piece)[0]
        elif cut.halo is None:
            return node
        return _narrowed(graph, node, piece, wanted[0] - first, wanted[1] - wanted[0])


def _narrowed(graph: fx.Graph, node: fx.Node, piece: Slice, start: int, length: int) -> fx.Node:
    """The part [start, start + length) of the steps that a node of a body has."""
    shape = node.meta["val"].shape if isinstance(node.meta["val"], torch.Tensor) else None
    if shape is None or shape[piece.dim] == piece.outer * length * piece.inner:
        return node
    if piece.outer == 1:
        bounds = start * piece.inner, (start + length) * piece.inner
        return _added(graph, node, aten.slice.Tensor, node, piece.dim, *bounds)
    steps = shape[piece.dim] // (piece.outer * piece.inner)
    split = _added(graph, node, aten.unflatten.int, node, piece.dim, (piece.outer, steps, piece.inner))
    part = _added(graph, node, aten.slice.Tensor, split, piece.dim + 1, start, start + length)
    return _added(graph, node, aten.reshape.default, part, piece.resized(shape, length))


def _added(graph: fx.Graph, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node that prepares what ``origin`` of the program has made."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {**origin.meta, "val": evaluate(node)}
    return node
