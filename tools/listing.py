"""A rewritten graph as a program to read: a line an operator, loops indented, weights by their paths in the model.

Beside each result stands its layout and what is live while it is computed. The program is not meant to be run.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxstream.budget import format_bytes
from fxstream.passes.graph.capture import ROOT, module_path
from fxstream.passes.graph.liveness import analyze, tensors_of
from fxstream.runtime.loop import Slice, SlicedLoop, Step

INDENT = "    "
VARIABLES = "ijklmn"
"""The variables of nested loops, from the outermost in."""

Names = Mapping[fx.Node, str]


def listing(graph_module: fx.GraphModule) -> str:
    """The whole program."""
    names = _names(graph_module)
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    lines = [f"def forward({', '.join(names[node] for node in inputs)}):"]
    lines += [f"{INDENT}# {names[node]}: {_layout(node)}" for node in inputs]
    lines += [INDENT + line for line in _body(graph_module, names, depth=0, path="")]
    results = ", ".join(names[node] for node in _results(graph_module))
    return "\n".join([*lines, f"{INDENT}return {results}"]) + "\n"


def loop_listings(graph_module: fx.GraphModule) -> dict[str, str]:
    """Each loop alone, by its name after those of the loops around it, such as ``"loop_0/loop_7"``.

    Loops within a loop are one line there.
    """
    return dict(_loop_listings(graph_module, _names(graph_module), ()))


def loop_of(graph_module: fx.GraphModule, node: fx.Node) -> SlicedLoop:
    """The loop that a ``call_module`` node runs."""
    loop = graph_module.get_submodule(str(node.target))
    assert isinstance(loop, SlicedLoop)
    return loop


def typical(loop: SlicedLoop) -> tuple[Step, fx.GraphModule]:
    """One slice of a loop and its body, which stands for the others: they do the same at other sizes.

    Where bodies have loops of their own, the body that needs most, as in the plan; else that of the slice in the
    middle, which no border clips.
    """
    bodies = loop.graphs()
    looped = {name: body for name, body in bodies.items() if any(node.op == "call_module" for node in body.graph.nodes)}
    if not looped:
        step = loop.steps[len(loop.steps) // 2]
        return step, bodies[step.body]
    most = max(looped, key=lambda name: max(analyze(looped[name]).live_bytes()))
    return next(step for step in loop.steps if step.body == most), looped[most]


def _loop_listings(graph_module: fx.GraphModule, names: Names, around: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            loop, path = loop_of(graph_module, node), (*around, node.name)
            yield "/".join(path), "\n".join(_loop(node, loop, names, len(around), expand=False)) + "\n"
            yield from _loop_listings(typical(loop)[1], _inner_names(node, loop, names, len(around)), path)


def _names(graph_module: fx.GraphModule) -> dict[fx.Node, str]:
    """How each node of a graph is written. What a loop returns goes by the loop's name."""
    names: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        names[node] = node.name
        if node.op == "get_attr":
            names[node] = str(node.target).removeprefix(f"{ROOT}.")
        elif node.target is operator.getitem and _arguments(node)[0].op == "call_module":
            call, position = _arguments(node)
            names[node] = _result(call, position)
    return names


def _result(call: fx.Node, position: int) -> str:
    return call.name if len(call.meta["val"]) == 1 else f"{call.name}_{position}"


def _inner_names(call: fx.Node, loop: SlicedLoop, names: Names, depth: int) -> dict[fx.Node, str]:
    """How the nodes of a loop's body are written: what it gets whole as outside."""
    _, body = typical(loop)
    inner = _names(body)
    for placeholder, argument, piece in zip(_placeholders(body), _arguments(call), loop.inputs, strict=True):
        inner[placeholder] = names[argument] if piece is None else f"{placeholder.name}_{VARIABLES[depth]}"
    return inner


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _results(graph_module: fx.GraphModule) -> tuple[fx.Node, ...]:
    (results,) = _arguments(graph_module.graph.output_node())
    return tuple(results)


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def _body(graph_module: fx.GraphModule, names: Names, depth: int, path: str, expand: bool = True) -> Iterator[str]:
    """The operators of a graph, with a heading where the user's module changes."""
    liveness = analyze(graph_module)
    live = liveness.live_bytes()
    dying: dict[int, list[str]] = {}
    for node in liveness.schedule:
        for position, storage in enumerate(liveness.of[node]):
            if liveness.storages[storage].node is node:
                name = _result(node, position) if node.op == "call_module" else names[node]
                dying.setdefault(liveness.storages[storage].death, []).append(name)
    for index, node in enumerate(liveness.schedule):
        if names[node] != node.name:
            continue
        if module_path(node) != path:
            path = module_path(node)
            yield f"# {path or 'the model itself'}"
        if node.op == "call_module":
            loop = loop_of(graph_module, node)
            if expand:
                yield from _loop(node, loop, names, depth)
            else:
                arguments = ", ".join(names[argument] for argument in _arguments(node))
                yield f"{node.name} = {node.name}({arguments})  # {len(loop.lengths)} slices"
        else:
            new = any(liveness.storages[storage].birth == index for storage in liveness.of[node])
            size = f", {format_bytes(live[index])} live" if new else ""
            yield f"{names[node]} = {_call(node, names)}  # {_layout(node)}{size}"
        if index in dying:
            yield f"del {', '.join(dying[index])}"


def _loop(call: fx.Node, loop: SlicedLoop, names: Names, depth: int, expand: bool = True) -> Iterator[str]:
    """A loop: its outputs, the windows that its body reads, the body, and what is stored."""
    variable, inner = VARIABLES[depth], _inner_names(call, loop, names, depth)
    step, body = typical(loop)
    for position, output in enumerate(loop.outputs):
        size = f"{'x'.join(map(str, output.shape))} {_name(output.dtype)}"
        if output.over is None:
            yield f"{_result(call, position)} = empty()  # {size}"
        else:
            yield f"{_result(call, position)} = {names[_arguments(call)[output.over]]}  # {size}, written over it"
    yield f"for {variable} in slices({_runs(loop.lengths)}):"
    inputs = zip(_placeholders(body), _arguments(call), loop.inputs, step.reads, strict=True)
    for placeholder, argument, piece, read in inputs:
        if piece is not None and read is not None:
            window = _window(names[argument], piece, f"{variable}{_halo(loop, step, piece, read)}")
            yield f"{INDENT}{inner[placeholder]} = {window}  # {_layout(placeholder)}"
    for line in _body(body, inner, depth + 1, module_path(call) if expand else "", expand):
        yield INDENT + line
    for position, (output, result) in enumerate(zip(loop.outputs, _results(body), strict=True)):
        yield f"{INDENT}{_window(_result(call, position), output.slice, variable)} = {inner[result]}"


def _runs(lengths: tuple[int, ...]) -> str:
    """Lengths of slices, equal ones together: ``"4 x 3, 2 x 2"``."""
    return ", ".join(f"{lengths.count(length)} x {length}" for length in dict.fromkeys(lengths))


def _halo(loop: SlicedLoop, step: Step, piece: Slice, read: tuple[int, int]) -> str:
    """By how much a window is wider than the slice: ``" with 1 before, 1 after"``; its steps where they are others."""
    start, length = read
    if piece.extent != loop.outputs[0].slice.extent:
        return f" ({length} of {piece.extent})"
    before, after = step.writes[0] - start, start + length - step.writes[0] - step.length
    wider = [f"{count} {where}" for count, where in ((before, "before"), (after, "after")) if count]
    return f" with {', '.join(wider)}" if wider else ""


def _window(name: str, piece: Slice, variable: str) -> str:
    """A slice of a tensor, as an index; the axis inside a merged dimension is told by its factors."""
    factors = f" of {piece.outer} x {piece.extent} x {piece.inner}" if piece.outer > 1 or piece.inner > 1 else ""
    return f"{name}[{':, ' * piece.dim}{variable}{factors}]"


def _call(node: fx.Node, names: Names) -> str:
    if node.target is operator.getitem:
        source, position = _arguments(node)
        return f"{names[source]}[{position}]"
    target: Any = node.target
    name = target.overloadpacket.__name__ if isinstance(target, OpOverload) else getattr(target, "__name__", target)
    arguments = [_argument(argument, names) for argument in node.args]
    arguments += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"


def _argument(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    return _name(value)


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.layout)) else repr(value)


def _layout(node: fx.Node) -> str:
    found = [f"{'x'.join(map(str, x.shape)) or 'scalar'} {_name(x.dtype)}" for x in tensors_of(node.meta["val"])]
    return ", ".join(found)
