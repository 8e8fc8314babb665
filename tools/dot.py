"""A captured graph for Graphviz: a box a module, with the operators that run in it, and frames around the loops."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from fxstream.budget import format_bytes
from fxstream.passes.graph.capture import module_path
from fxstream.passes.graph.liveness import bytes_of
from fxstream.planned import Compiled
from fxstream.report import PlannedGroup

MOST_BOXES = 300
"""Beyond these, modules within one another share a box: a picture of more can't be read, nor is it soon laid out."""

QUICKLY = "splines=line; nslimit=1; nslimit1=1; mclimit=0.5;"
"""Graphviz's own settings for a large graph: without, it takes minutes."""


@dataclass
class Box:
    """The operators of one module that run one after the other, inside the loops ``loops``."""

    name: str
    module_path: str
    loops: tuple[str, ...]
    operators: dict[str, int] = field(default_factory=dict)
    live_bytes: int = 0


def to_dot(compiled: Compiled) -> str:
    """The graph in the DOT language."""
    plan, graph = compiled.plan, compiled.captured.graph_module.graph
    live = dict(zip(plan.before.nodes, plan.before.live_bytes, strict=True))
    loops = _loops_of(plan.before.nodes, plan.groups)
    nodes = [node for node in graph.nodes if node.name in live]
    deepest = max((module_path(node).count(".") + 1 for node in nodes), default=1)
    for depth in range(deepest, 0, -1):
        box_of = _boxes(nodes, live, loops, depth)
        boxes = list({box.name: box for box in box_of.values()}.values())
        if len(boxes) <= MOST_BOXES:
            break
    edges: dict[tuple[str, str], int] = {}
    for node, box in box_of.items():
        for read in node.all_input_nodes:
            if read in box_of and box_of[read] is not box:
                ends = (box_of[read].name, box.name)
                edges[ends] = max(edges.get(ends, 0), bytes_of(read.meta["val"]))
    lines = [
        "digraph plan {",
        f"  {QUICKLY}",
        '  node [shape=box, fontname="sans-serif"];',
        '  edge [fontname="sans-serif"];',
    ]
    lines += _clusters(boxes, {group.name: group for group in plan.groups})
    lines += [f"  {a} -> {b} [label={_quoted(format_bytes(size))}];" for (a, b), size in edges.items()]
    return "\n".join([*lines, "}"]) + "\n"


def _boxes(
    nodes: Sequence[fx.Node], live: Mapping[str, int], loops: Mapping[str, tuple[str, ...]], depth: int
) -> dict[fx.Node, Box]:
    """The box of each node, modules told by the first ``depth`` names of their paths."""
    box_of: dict[fx.Node, Box] = {}
    box = None
    for node in nodes:
        path, around = ".".join(module_path(node).split(".")[:depth]), loops[node.name]
        if box is None or (box.module_path, box.loops) != (path, around):
            box = Box(f"box_{len(box_of)}", path, around)
        box_of[node] = box
        operator = str(node.target).removeprefix("aten.").removesuffix(".default")
        box.operators[operator] = box.operators.get(operator, 0) + 1
        box.live_bytes = max(box.live_bytes, live[node.name])
    return box_of


def _loops_of(nodes: tuple[str, ...], groups: tuple[PlannedGroup, ...]) -> dict[str, tuple[str, ...]]:
    """The loops around each node, from the outermost in."""
    around: list[tuple[str, ...]] = [()] * len(nodes)
    for group in groups:
        for first, last in group.spans:
            for index in range(first, last + 1):
                around[index] = (*around[index], group.name)
    return dict(zip(nodes, around, strict=True))


def _clusters(boxes: list[Box], groups: dict[str, PlannedGroup]) -> Iterator[str]:
    """The boxes, within a cluster for each loop that is open where they stand."""
    opened: tuple[str, ...] = ()
    for box in [*boxes, None]:
        wanted = box.loops if box else ()
        shared = 0
        while shared < min(len(opened), len(wanted)) and opened[shared] == wanted[shared]:
            shared += 1
        for depth in range(len(opened), shared, -1):
            yield "  " * depth + "}"
        for depth in range(shared, len(wanted)):
            group = groups[wanted[depth]]
            label = f"{group.name}: {group.slices} slices, {group.axis}, {format_bytes(group.bytes_after)}"
            yield (
                "  " * (depth + 1)
                + f"subgraph {_quoted('cluster_' + group.name)} {{ label={_quoted(label)}; style=bold;"
            )
        opened = wanted
        if box:
            yield "  " * (len(opened) + 1) + f"{box.name} [label={_quoted(_label(box))}];"


def _label(box: Box) -> str:
    operators = [name if count == 1 else f"{count} {name}" for name, count in box.operators.items()]
    return "\n".join(
        [box.module_path or "the model itself", ", ".join(operators), f"{format_bytes(box.live_bytes)} live"]
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
