"""Liveness: when each storage of a graph is born and dies, and what that makes of memory along the schedule.

A storage is born at the node that creates it and dies after the last use of any view of it; outputs live to the end.
Aliasing is read off the fake values: ``node.meta["val"]`` of a view shares its base's storage. Weights and inputs are
apart: they are the caller's. During a node its inputs, its outputs and its transient memory are live at once.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.passes.graph.capture import module_path
from fxstream.passes.graph.effects import draws, memories, writes
from fxstream.passes.machine.workspace import workspace_bytes
from fxstream.runtime.fetch import fetch
from fxstream.runtime.lookup import LOOKUP
from fxstream.runtime.loop import SlicedLoop
from fxstream.runtime.release import give_back
from fxstream.runtime.spill import send_home


@dataclass(frozen=True)
class LiveTensor:
    """A storage that is live at some node: ``bytes`` of it, made by ``node`` of the user's ``module_path``.

    It is live from position ``birth`` to position ``death`` of its profile's nodes, both included.
    """

    node: str
    module_path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    birth: int
    death: int


@dataclass(frozen=True)
class MemoryProfile:
    """Memory along a graph's schedule, in bytes, over its weights and inputs.

    ``live_bytes[i]`` is what is live during ``nodes[i]``: those of ``tensors`` that live then, and a kernel's workspace
    or the inside of a sliced loop. ``tensors`` are in the order of their birth; weights that are fetched from their
    homes are among them, and not in ``weight_bytes``.
    """

    nodes: tuple[str, ...]
    module_paths: tuple[str, ...]
    live_bytes: tuple[int, ...]
    tensors: tuple[LiveTensor, ...]
    weight_bytes: int
    input_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is live during any node."""
        return max(self.live_bytes, default=0)

    @property
    def peak_index(self) -> int:
        """Index into ``nodes`` of the first node at the peak."""
        return self.live_bytes.index(self.peak_bytes) if self.live_bytes else 0

    def live_at(self, index: int) -> tuple[LiveTensor, ...]:
        """The tensors live during ``nodes[index]``, largest first."""
        return tuple(sorted((t for t in self.tensors if t.birth <= index <= t.death), key=lambda t: -t.bytes))

    @cached_property
    def holders(self) -> tuple[LiveTensor, ...]:
        """The tensors live at the peak, largest first."""
        return self.live_at(self.peak_index)

    @property
    def transient_bytes(self) -> int:
        """The rest of the peak: a kernel's workspace, or the inside of a sliced loop."""
        return self.peak_bytes - sum(tensor.bytes for tensor in self.holders)


@dataclass(frozen=True)
class Storage:
    """One storage of a graph: born at schedule position ``birth``, last used at ``death``.

    ``node`` is the node that made it; what the graph returns dies after the last position. Storages of weights and
    inputs have no birth and are not listed. One that a loop makes in a file has no ``bytes`` in memory.
    """

    node: fx.Node
    key: int
    bytes: int
    birth: int
    death: int


@dataclass(frozen=True)
class Liveness:
    """The storages of a graph along its schedule.

    ``of[node]`` are the indices into ``storages`` that a node's value lies in (none for weights, inputs and views of
    them).
    """

    schedule: tuple[fx.Node, ...]
    storages: tuple[Storage, ...]
    of: dict[fx.Node, tuple[int, ...]]
    transient: tuple[int, ...]

    def live_bytes(self) -> list[int]:
        """Bytes live during each node of the schedule."""
        changes = [0] * (len(self.schedule) + 2)
        for storage in self.storages:
            changes[storage.birth] += storage.bytes
            changes[storage.death + 1] -= storage.bytes
        live, total = [], 0
        for change, transient in zip(changes, self.transient, strict=False):
            total += change
            live.append(total + transient)
        return live


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a node's value: one, several, or none."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def device_of(graph_module: fx.GraphModule) -> torch.device:
    """The device of most bytes that a graph reads and makes."""
    sizes: Counter[torch.device] = Counter()
    for node in graph_module.graph.nodes:
        for tensor in tensors_of(node.meta.get("val")) if node.op != "output" else ():
            sizes[tensor.device] += bytes_of(tensor)
    return max(sizes, key=sizes.__getitem__, default=torch.device("cpu"))


def bytes_of(value: Any) -> int:
    """Bytes of the elements of a node's value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))


def storages_of(value: Any) -> Iterator[tuple[int, int]]:
    """(identity, bytes) of each storage under a value."""
    for tensor in tensors_of(value):
        storage = tensor.untyped_storage()
        yield storage._cdata, int(storage.nbytes())  # of a permuted input torch.export makes a symbolic number


def analyze(graph_module: fx.GraphModule) -> Liveness:
    """The liveness of a graph whose nodes carry fake values."""
    graph = graph_module.graph
    schedule = tuple(node for node in graph.nodes if node.op in ("call_function", "call_module", "call_method"))
    position = {node: index for index, node in enumerate(schedule)}
    outside = {
        key
        for node in graph.nodes
        if node.op in ("placeholder", "get_attr")
        for key, _ in storages_of(node.meta["val"])
    }
    at_home = {key for node in schedule for key in _sent_home(graph_module, node)}
    index: dict[int, int] = {}
    made: list[tuple[fx.Node, int, int]] = []
    death: list[int] = []
    of: dict[fx.Node, tuple[int, ...]] = {}
    for node in schedule:
        mine = []
        for key, size in storages_of(node.meta["val"]):
            if key in outside:
                continue
            if key not in index:
                index[key] = len(made)
                made.append((node, key, 0 if key in at_home else size))
                death.append(position[node])
            if index[key] not in mine:
                mine.append(index[key])
        of[node] = tuple(mine)
    for node in schedule:
        last = max((position.get(user, len(schedule)) for user in node.users), default=position[node])
        for storage in of[node]:
            death[storage] = max(death[storage], last)
    storages = tuple(Storage(*each, position[each[0]], dead) for each, dead in zip(made, death, strict=True))
    transient = tuple(_transient_bytes(graph_module, node) + _read_at_home(node, at_home) for node in schedule)
    return Liveness(schedule, storages, of, transient)


def _transient_bytes(graph_module: fx.GraphModule, node: fx.Node) -> int:
    """What a node allocates and frees again: a kernel's workspace, or what a sliced loop's bodies and windows take."""
    if node.op != "call_module":
        return 0 if _is_drawn_anew(node) else workspace_bytes(node)
    loop = loop_of(graph_module, node)
    if not loop.moves:
        return max(map(body_bytes, loop.graphs().values()))
    tensors, outs = [each.meta["val"] for each in node.args], node.meta["val"]
    inside = {name: body_bytes(body) for name, body in loop.graphs().items()}
    return max(inside[step.body] + loop.bytes_mapped(step, tensors, outs) for step in loop.steps)


def mapped_bytes(node: fx.Node, loop: SlicedLoop) -> int:
    """The most that a slice of the loop that a node calls has in memory of what is in files."""
    tensors, outs = [each.meta["val"] for each in node.args], node.meta["val"]
    return max(loop.bytes_mapped(step, tensors, outs) for step in loop.steps) if loop.moves else 0


def loop_of(graph_module: fx.GraphModule, node: fx.Node) -> SlicedLoop:
    """The loop that a node calls."""
    return loop_at(graph_module, str(node.target))


def loop_at(graph_module: fx.GraphModule, name: str) -> SlicedLoop:
    """The loop of that name."""
    loop = graph_module.get_submodule(name)
    assert isinstance(loop, SlicedLoop)
    return loop


def _sent_home(graph_module: fx.GraphModule, node: fx.Node) -> set[int]:
    """The storages that are in files as a node makes or sends them."""
    if node.target is send_home:
        return memories(node.meta["val"])
    if node.op != "call_module":
        return set()
    outputs = zip(loop_of(graph_module, node).outputs, node.meta["val"], strict=True)
    return {key for output, value in outputs if output.home is not None for key in memories(value)}


def _read_at_home(node: fx.Node, at_home: set[int]) -> int:
    """Bytes of files that an operator has in memory, which is all of what it reads; or that it makes, to be sent."""
    return sum(size for key, size in touched(node) if key in at_home) if at_home else 0


def touched(node: fx.Node) -> Iterator[tuple[int, int]]:
    """(identity, bytes) of each storage that an operator reads or makes; none where it only takes a view."""
    if node.op != "call_function" or node.target in (operator.getitem, give_back):
        return
    read = dict(each for given in node.all_input_nodes for each in storages_of(given.meta["val"]))
    made = dict(storages_of(node.meta["val"]))
    if made.keys() - read.keys() or writes(node) or node.target is send_home:
        yield from (read | made).items()


_BODIES: WeakKeyDictionary[fx.GraphModule, int] = WeakKeyDictionary()


def body_bytes(body: fx.GraphModule) -> int:
    """The most that is live inside a loop's body, which nobody changes: analysed once."""
    if body not in _BODIES:
        _BODIES[body] = max(analyze(body).live_bytes(), default=0)
    return _BODIES[body]


def bodies_bytes(loop: SlicedLoop) -> dict[int, int]:
    """Length of a slice -> the most that is live inside a body of it, over the loop's inputs and outputs."""
    peaks = {name: body_bytes(body) for name, body in loop.graphs().items()}
    most: dict[int, int] = {}
    for step in loop.steps:
        most[step.length] = max(most.get(step.length, 0), peaks[step.body])
    return most


def _is_drawn_anew(node: fx.Node) -> bool:
    """Whether a node draws of a shape, or from a generator of its own: asked for its workspace, it would draw."""
    reads = [read.meta["val"] for read in node.all_input_nodes]
    return draws(node) and (not tensors_of(reads) or any(isinstance(value, torch.Generator) for value in reads))


def profile(graph_module: fx.GraphModule) -> MemoryProfile:
    """The memory profile of a graph whose nodes carry fake values."""
    liveness = analyze(graph_module)
    graph = graph_module.graph
    return MemoryProfile(
        nodes=tuple(node.name for node in liveness.schedule),
        module_paths=tuple(module_path(node) for node in liveness.schedule),
        live_bytes=tuple(liveness.live_bytes()),
        tensors=tuple(_describe(storage, len(liveness.schedule) - 1) for storage in liveness.storages),
        weight_bytes=_bytes_of(graph, "get_attr"),
        input_bytes=_bytes_of(graph, "placeholder"),
    )


def _bytes_of(graph: fx.Graph, op: str) -> int:
    nodes = [node for node in graph.find_nodes(op=op) if not stays_at_home(node)]
    return sum({key: size for node in nodes for key, size in storages_of(node.meta["val"])}.values())


def stays_at_home(weight: fx.Node) -> bool:
    """Whether a weight, or a view of one, is only fetched, or looked up."""
    memory = {key for key, _ in storages_of(weight.meta["val"])}

    def leaves_it(user: fx.Node) -> bool:
        if user.target in (fetch, LOOKUP) or _fetches(user, weight):
            return True
        return memory == {key for key, _ in storages_of(user.meta.get("val"))} and stays_at_home(user)

    return bool(weight.users) and all(map(leaves_it, weight.users))


def _fetches(call: fx.Node, weight: fx.Node) -> bool:
    """Whether a loop only fetches a weight that it is given."""
    owner = call.graph.owning_module
    if call.op != "call_module" or owner is None:
        return False
    loop = loop_of(owner, call)
    given = [position for position, argument in enumerate(call.args) if argument is weight]
    bodies = [body.graph.find_nodes(op="placeholder") for body in loop.graphs().values()]
    return all(stays_at_home(placeholders[position]) for placeholders in bodies for position in given)


def _describe(storage: Storage, last: int) -> LiveTensor:
    node = storage.node
    tensor = next(t for t in tensors_of(node.meta["val"]) if t.untyped_storage()._cdata == storage.key)
    lifetime = (storage.birth, min(storage.death, last))
    return LiveTensor(node.name, module_path(node), tuple(tensor.shape), tensor.dtype, storage.bytes, *lifetime)
