"""Homes: which weights stay on the device while a graph runs, and when each of the others is fetched there.

A graph's activations leave some of a limit, more at some nodes than at others. Each node needs the weights that it
reads; what is left goes to weights that stay, those first that would be fetched most often, of these the small ones,
and to fetching ahead of the use, so that the copy is done when the node begins. Fetches are in the order of their uses,
as they are copied one after another.

What a loop reads is fetched before it, once for all its slices. Where there is no room for all that, and the loop is
one around others, it is fetched in its body, once a slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxstream.passes.graph.effects import memories, written_by
from fxstream.passes.graph.liveness import analyze, bytes_of, mapped_bytes, stays_at_home
from fxstream.runtime.loop import SlicedLoop

Path = tuple[str, ...]
"""A graph in a graph: the names of the loops, from outside in, that it is the body of; () is the graph itself."""


@dataclass(frozen=True)
class Use:
    """A weight is read by the node at ``position`` of the schedule of the graph at ``path``, which runs ``times``.

    That is from step ``first`` to step ``last`` of the timeline.
    """

    path: Path
    position: int
    first: int
    last: int
    times: int


@dataclass(frozen=True)
class Weight:
    """A weight by its storage: its name, its bytes, and what reads it, in order."""

    storage: int
    name: str
    bytes: int
    uses: tuple[Use, ...]

    @property
    def fetches(self) -> int:
        """How often it is fetched where each use fetches it."""
        return sum(use.times for use in self.uses)


@dataclass(frozen=True)
class Stay:
    """A weight on the device for some of its uses, in the graph at ``path``: fetched before ``begin``, read from
    ``first`` to ``last``, which are positions of that graph's schedule without fetches."""

    weight: Weight
    path: Path
    begin: int
    first: int
    last: int
    times: int


@dataclass(frozen=True)
class Lookup:
    """A table at home by its name, and the bytes of the rows that a node reads of it there."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Homes:
    """Where the weights of a graph live: those of ``stays`` in their files, from which they are fetched in that order.

    So do the tables of ``lookups``, of which rows are read. The others stay, which are ``resident_bytes``.
    ``peak_bytes`` is the most that the graph holds with its weights, over its inputs.
    """

    stays: tuple[Stay, ...]
    resident_bytes: int
    peak_bytes: int
    lookups: tuple[Lookup, ...] = ()

    @property
    def moved_bytes(self) -> int:
        """Bytes of weights that a call reads from files."""
        fetched = sum(stay.weight.bytes * stay.times for stay in self.stays)
        return fetched + sum(lookup.bytes for lookup in self.lookups)


def place_weights(graph_module: fx.GraphModule, limit: int | None, kept: Collection[str] = ()) -> Homes:
    """Where weights live so that a graph holds at most ``limit`` bytes over its inputs; None: as few as it can.

    Weights of the names ``kept`` stay. Where the limit can't be met, ``peak_bytes`` of the result says what the least
    is.
    """
    movable, pinned = _movable(graph_module, kept)
    sizes = {key: size for key, (_, size) in movable.items()}
    room = max(_least(graph_module, sizes), (limit or 0) - pinned)
    timeline = _Timeline(sizes, room)
    timeline.walk(graph_module, (), 1, 0, set(sizes))
    weights = [Weight(key, name, size, tuple(timeline.uses[key])) for key, (name, size) in movable.items()]
    left = room - torch.tensor(timeline.held, dtype=torch.int64)
    moving = _moving(weights, left)
    stays = _begun(_merged(moving, left), left, timeline)
    resident = pinned + sum(weight.bytes for weight in set(weights) - set(moving))
    return Homes(tuple(stays), resident, pinned + (room - int(left.min()) if len(left) else 0))


def _movable(graph_module: fx.GraphModule, names: Collection[str]) -> tuple[dict[int, tuple[str, int]], int]:
    """Storages of weights that may be fetched, with name and bytes; and the bytes of those that may not.

    Those may not that are of these ``names``, written to or returned, and those that share memory, or are a part of it.
    Tables that are looked up at home are neither.
    """
    graph = graph_module.graph
    kept = {key for node in graph.nodes for each in written_by(node) for key in memories(each.meta["val"])}
    kept.update(key for node in graph.output_node().all_input_nodes for key in memories(node.meta["val"]))
    nodes: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="get_attr"):
        for key in memories(node.meta["val"]):
            nodes[key].append(node)
    sizes, pinned = {}, 0
    for key, (node, *others) in nodes.items():
        if stays_at_home(node):
            continue
        may = not others and key not in kept and str(node.target) not in names
        if may and _is_dense(node.meta["val"]):
            sizes[key] = str(node.target), bytes_of(node.meta["val"])
        else:
            pinned += int(node.meta["val"].untyped_storage().nbytes())
    return sizes, pinned


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its storage, each byte once."""
    step = 1
    for stride, size in sorted(each for each in zip(tensor.stride(), tensor.shape, strict=True) if each[1] != 1):
        if stride != step:
            return False
        step *= size
    return 0 < bytes_of(tensor) == tensor.untyped_storage().nbytes()


def home_nodes(graph_module: fx.GraphModule, storages: Iterable[int]) -> dict[int, fx.Node]:
    """The nodes by which a graph, or a loop's body, is given these weights whole, by their storages."""
    wanted, found = set(storages), dict[int, fx.Node]()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            for key in memories(node.meta["val"]) & wanted:
                if _is_dense(node.meta["val"]):
                    found[key] = node
    return found


def _reads(node: fx.Node, sizes: Iterable[int]) -> set[int]:
    """The weights that a node reads, and is no view of."""
    read = {key for each in node.all_input_nodes for key in memories(each.meta["val"])}
    return read.intersection(sizes) - memories(node.meta["val"])


def _body(graph_module: fx.GraphModule, node: fx.Node) -> tuple[SlicedLoop, fx.GraphModule] | None:
    """A loop around others, whose slices have one body, and that body."""
    loop = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    bodies = list(loop.graphs().values()) if isinstance(loop, SlicedLoop) else []
    if not isinstance(loop, SlicedLoop) or len(bodies) != 1 or not bodies[0].graph.find_nodes(op="call_module"):
        return None
    return loop, bodies[0]


def _given_whole(body: fx.GraphModule, read: set[int]) -> set[int]:
    """Of the weights that a loop reads, those that its body can fetch."""
    views = (node for node in body.graph.find_nodes(op="placeholder") if not _is_dense(node.meta["val"]))
    return set(home_nodes(body, read)).difference(*(memories(node.meta["val"]) for node in views))


def _least(graph_module: fx.GraphModule, sizes: dict[int, int]) -> int:
    """The least that a graph can hold together with the weights that nodes read."""
    liveness, most = analyze(graph_module), 0
    for node, live, transient in zip(liveness.schedule, liveness.live_bytes(), liveness.transient, strict=True):
        read = _reads(node, sizes)
        held = live + sum(sizes[key] for key in read)
        inner = _body(graph_module, node) if held > most else None
        if inner is not None:
            inside = _given_whole(inner[1], read)
            outside = held - transient - sum(sizes[key] for key in inside) + mapped_bytes(node, inner[0])
            held = min(held, outside + _least(inner[1], {key: sizes[key] for key in inside}))
        most = max(most, held)
    return most


@dataclass
class _Timeline:
    """The nodes of a graph as they run, the bodies of loops in place of those whose weights are over ``limit``.

    ``held`` are the bytes live at each step with the weights that it reads; ``starts`` are the steps at which each
    graph's positions begin.
    """

    sizes: dict[int, int]
    limit: int
    held: list[int] = field(default_factory=list)
    uses: dict[int, list[Use]] = field(default_factory=lambda: defaultdict(list))
    starts: dict[Path, list[int]] = field(default_factory=lambda: defaultdict(list))

    def walk(self, graph_module: fx.GraphModule, path: Path, times: int, outside: int, given: set[int]) -> None:
        """Add a graph's nodes, which may fetch the weights ``given``, while ``outside`` bytes are held around it."""
        liveness = analyze(graph_module)
        live = liveness.live_bytes()
        for position, node in enumerate(liveness.schedule):
            first, read = len(self.held), _reads(node, given)
            self.starts[path].append(first)
            held = outside + live[position] + sum(self.sizes[key] for key in read)
            inner = _body(graph_module, node) if held > self.limit else None
            if inner is None:
                self.held.append(held)
            else:
                loop, body = inner
                fetched = _given_whole(body, read)
                read -= fetched
                around = outside + live[position] - liveness.transient[position]
                around += sum(self.sizes[key] for key in read) + mapped_bytes(node, loop)
                self.walk(body, (*path, node.name), times * len(loop.steps), around, fetched)
            for key in read:
                self.uses[key].append(Use(path, position, first, len(self.held) - 1, times))


def _moving(weights: Sequence[Weight], left: torch.Tensor) -> list[Weight]:
    """Those weights that there is no room for to stay; ``left`` becomes what those that stay leave.

    Where a step leaves room to fetch what is read next while it runs, that is kept.
    """
    moving = _without_room(weights, left.clone())
    if moving:
        spare = left - _next_bytes(weights, left)
        moving = _without_room(weights, spare)
    for weight in set(weights).difference(moving):
        left[_elsewhere(weight, len(left))] -= weight.bytes
    return moving


def _without_room(weights: Iterable[Weight], left: torch.Tensor) -> list[Weight]:
    """Those weights that can't stay in what is left, which becomes less by those that can."""
    moving = []
    for weight in sorted(weights, key=lambda weight: (-weight.fetches, weight.bytes)):
        elsewhere = _elsewhere(weight, len(left))
        if bool((left[elsewhere] < weight.bytes).any()):
            moving.append(weight)
        else:
            left[elsewhere] -= weight.bytes
    return moving


def _elsewhere(weight: Weight, steps: int) -> torch.Tensor:
    """The steps that don't read a weight."""
    elsewhere = torch.ones(steps, dtype=torch.bool)
    for use in weight.uses:
        elsewhere[use.first : use.last + 1] = False
    return elsewhere


def _next_bytes(weights: Iterable[Weight], left: torch.Tensor) -> torch.Tensor:
    """At each step, the bytes of weights that the next one reads which reads any, if there is room for them."""
    read = [0] * (len(left) + 1)
    for weight in weights:
        for use in weight.uses:
            read[use.first] += weight.bytes
    following = [0] * (len(left) + 1)
    for step in reversed(range(len(left))):
        following[step] = read[step + 1] or following[step + 1]
    ahead = torch.tensor(following[:-1], dtype=torch.int64)
    return torch.where(ahead <= left, ahead, 0)


def _merged(moving: Sequence[Weight], left: torch.Tensor) -> list[tuple[Use, Stay]]:
    """The stays of weights on the device with their first uses, in the order of these; each begins when it is used.

    A weight stays until its next use in the same graph where there is room.
    """
    stays: list[tuple[Use, Stay]] = []
    for weight in moving:
        before: Use | None = None
        for use in weight.uses:
            between = left[before.last + 1 : use.first] if before is not None and before.path == use.path else None
            if between is not None and bool((between >= weight.bytes).all()):
                between -= weight.bytes
                stays[-1] = stays[-1][0], replace(stays[-1][1], last=use.position)
            else:
                place = use.position, use.position, use.position
                stays.append((use, Stay(weight, use.path, *place, use.times)))
            before = use
    return sorted(stays, key=lambda each: each[0].first)


def _begun(stays: Iterable[tuple[Use, Stay]], left: torch.Tensor, timeline: _Timeline) -> list[Stay]:
    """The same, each begun as early as there is room, and in their order."""
    begun: list[Stay] = []
    earliest = 0
    for _, stay in stays:
        starts, begin = timeline.starts[stay.path], stay.first
        while begin and starts[begin - 1] >= earliest:
            between = left[starts[begin - 1] : starts[begin]]
            if bool((between < stay.weight.bytes).any()):
                break
            between -= stay.weight.bytes
            begin -= 1
        earliest = starts[begin]
        begun.append(replace(stay, begin=begin))
    return begun
