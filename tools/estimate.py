"""Estimated time of a rewritten graph, by the cost model that plans are made with: launches and memory traffic.

Arithmetic is the same whole or in slices, and left out: estimates compare plans of one model, they don't foretell time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxstream.passes.graph.capture import module_path
from fxstream.passes.graph.liveness import analyze, bytes_of, tensors_of
from fxstream.passes.machine.cost import CostModel, cost_model
from fxstream.passes.planning.grouping import LOOP_LAUNCHES
from fxstream.runtime.loop import SlicedLoop
from fxstream.tools.listing import loop_of


@dataclass(frozen=True)
class Step:
    """One node as it runs: its time and the bytes live during it; of a loop, the ``slices`` as lists of steps.

    A loop's name comes after those of the loops around it.
    """

    name: str
    module_path: str
    seconds: float
    live_bytes: int
    slices: tuple[tuple[Step, ...], ...] = ()


def estimated_seconds(graph_module: fx.GraphModule) -> float:
    """Estimated time of a whole graph."""
    return sum(step.seconds for step in steps(graph_module))


def steps(graph_module: fx.GraphModule) -> tuple[Step, ...]:
    """The nodes of a graph in the order that they run."""
    device = next(x.device for node in graph_module.graph.nodes for x in tensors_of(node.meta.get("val")))
    return tuple(_steps(graph_module, cost_model(device), (), 0, None))


def _steps(
    graph_module: fx.GraphModule, costs: CostModel, loops: tuple[str, ...], outside: int, working_set: int | None
) -> Iterator[Step]:
    """Steps of a graph inside ``loops``, while ``outside`` bytes are live; its ``working_set`` if it is a body."""
    liveness = analyze(graph_module)
    for index, (node, live) in enumerate(zip(liveness.schedule, liveness.live_bytes(), strict=True)):
        path, around = module_path(node), outside + live - liveness.transient[index]
        if node.op == "call_module":
            inside = (*loops, node.name)
            slices = tuple(_slices(loop_of(graph_module, node), costs, inside, around))
            seconds = sum(step.seconds for body in slices for step in body)
            yield Step(
                "/".join(inside), path, seconds + LOOP_LAUNCHES * costs.launch * len(slices), outside + live, slices
            )
            continue
        seconds = 0.0
        if any(liveness.storages[storage].birth == index for storage in liveness.of[node]):
            read = node.all_input_nodes
            weights = sum(bytes_of(argument.meta["val"]) for argument in read if argument.op == "get_attr")
            moved = bytes_of(node.meta["val"]) + sum(bytes_of(argument.meta["val"]) for argument in read) - weights
            rate = costs.rate(moved if working_set is None else working_set)
            seconds = costs.launch + moved * rate + weights * costs.rate(weights)
        yield Step(node.name, path, seconds, outside + live)


def _slices(loop: SlicedLoop, costs: CostModel, loops: tuple[str, ...], outside: int) -> Iterator[tuple[Step, ...]]:
    priced = {
        name: tuple(_steps(body, costs, loops, outside, max(analyze(body).live_bytes(), default=0)))
        for name, body in loop.graphs().items()
    }
    for step in loop.steps:
        yield priced[step.body]
