"""Reserve: what torch's caching allocator takes of a card for a graph, its weights and inputs among it.

More than the graph's tensors: blocks are rounded, and what is freed in one place is too small for what is needed in
another. So all allocations and releases of a run, in their order, go through a model of that allocator.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from torch import fx

from fxstream.passes.graph.liveness import analyze, loop_of, storages_of
from fxstream.passes.machine.caching import Block, CachingAllocator, ExpandableAllocator, OutOfMemory

REPEATS = 2
"""Slices of one length after another that are told of: the next find the memory as these have left it."""

NEAR = 1 / 256
"""How near, as a share, the least memory that a graph runs in is found."""

Events = list[tuple[int, int]]
"""(number, bytes) of each allocation, and (number, 0) of its release, in their order."""


@dataclass(frozen=True)
class Reserve:
    """Bytes on a card: the most that are ``allocated``, and the fewest that have to be ``reserved`` for that.

    With ``expandable`` segments, or without.
    """

    allocated: int
    reserved: int
    expandable: bool


def are_expandable() -> bool:
    """Whether torch's allocator has been asked for expandable segments."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in setting.replace(" ", "").lower() for setting in settings)


def reserve_of(graph_module: fx.GraphModule, beside: Sequence[int] = (), expandable: bool | None = None) -> Reserve:
    """What a run of a graph takes of a card, where blocks of ``beside`` bytes are held all the while, too."""
    expandable = are_expandable() if expandable is None else expandable
    kind = ExpandableAllocator if expandable else CachingAllocator
    held = [size for size in (*_held(graph_module), *beside) if size]
    events = list(_events(graph_module, count(), {}))
    free = kind()
    _run(free, held, events)
    low, high = free.most_allocated, free.most_reserved
    while high - low > NEAR * high:
        limit = (low + high) // 2
        try:
            _run(kind(limit), held, events)
            high = limit
        except OutOfMemory:
            low = limit
    return Reserve(free.most_allocated, high, expandable)


def _run(allocator: CachingAllocator, held: Sequence[int], events: Events) -> None:
    for size in held:
        allocator.allocate(size)
    blocks: dict[int, Block] = {}
    for number, size in events:
        if size:
            blocks[number] = allocator.allocate(size)
        else:
            allocator.release(blocks.pop(number))


def _held(graph_module: fx.GraphModule) -> list[int]:
    """Bytes of the weights and inputs of a graph."""
    nodes = (node for node in graph_module.graph.nodes if node.op in ("get_attr", "placeholder"))
    return list({key: size for node in nodes for key, size in storages_of(node.meta["val"])}.values())


@dataclass(frozen=True)
class _Step:
    """A node as it runs: bytes that it makes and takes for itself, by the numbers of storages, and those that die."""

    node: fx.Node
    born: tuple[tuple[int, int], ...]
    workspace: int
    dying: tuple[int, ...]


def _events(graph_module: fx.GraphModule, numbers: Iterator[int], known: dict[fx.GraphModule, list[_Step]]) -> Events:
    """The allocations and releases of a run; its results are released at the end."""
    if graph_module not in known:
        known[graph_module] = _steps(graph_module)
    names: dict[int, int] = {}
    events: Events = []
    for step in known[graph_module]:
        for storage, size in step.born:
            names[storage] = next(numbers)
            events.append((names[storage], size))
        if step.node.op == "call_module":
            loop = loop_of(graph_module, step.node)
            bodies, last, repeats = loop.graphs(), "", 0
            for each in loop.steps:
                repeats = repeats + 1 if each.body == last else 1
                last = each.body
                if repeats <= REPEATS:
                    events += _events(bodies[each.body], numbers, known)
        elif step.workspace:
            number = next(numbers)
            events += [(number, step.workspace), (number, 0)]
        events += [(names.pop(storage), 0) for storage in step.dying]
    return events + [(number, 0) for number in names.values()]


def _steps(graph_module: fx.GraphModule) -> list[_Step]:
    liveness = analyze(graph_module)
    born: list[list[tuple[int, int]]] = [[] for _ in liveness.schedule]
    dying: list[list[int]] = [[] for _ in liveness.schedule]
    for index, storage in enumerate(liveness.storages):
        if storage.bytes:
            born[storage.birth].append((index, storage.bytes))
            if storage.death < len(dying):
                dying[storage.death].append(index)
    rows = zip(liveness.schedule, born, liveness.transient, dying, strict=True)
    return [_Step(node, tuple(made), workspace, tuple(dead)) for node, made, workspace, dead in rows]
