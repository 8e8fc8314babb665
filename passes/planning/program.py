"""A captured graph as passes read it: calls with their tensors, storages and views, by schedule position."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxstream.passes import operators as _rules  # noqa: F401  (registers the rules)
from fxstream.passes.graph.effects import draws
from fxstream.passes.graph.flops import flops
from fxstream.passes.graph.launches import launches_of
from fxstream.passes.graph.liveness import Liveness, analyze, bytes_of, device_of, tensors_of, touched
from fxstream.passes.graph.propagate import fake_mode_of, fake_tensor
from fxstream.passes.machine.cost import CONVOLUTIONS, convolves_plainly
from fxstream.passes.machine.workspace import call_workspace_bytes
from fxstream.passes.operators.axes import Call, Cut, Slice, backward, forward, with_arguments
from fxstream.passes.operators.layout import slice_layout

ASKED_SHARE = 1 / 64
"""What a slice of a call allocates is asked where the whole call's workspace is at least this share of the peak."""


@dataclass(frozen=True)
class Value:
    """One node of the schedule: its call as rules see it, and the nodes whose tensors it reads.

    ``reads`` aligns with ``call.tensors``. Of a program's values, those have one ``key`` whose calls rules can't tell
    apart, and those one ``layout`` whose tensors lie in memory alike, too.
    """

    node: fx.Node
    call: Call
    reads: tuple[fx.Node, ...]
    key: int
    layout: int


@dataclass
class Program:
    """A graph with fake values, its liveness, and memoized questions to the axis rules.

    Storages of ``home_bytes`` and more count as if they were in files: they are in memory where an operator uses them,
    and where a slice does its window of them.
    """

    graph_module: fx.GraphModule
    home_bytes: float = inf
    liveness: Liveness = field(init=False)
    values: list[Value] = field(init=False)
    position: dict[fx.Node, int] = field(init=False)
    mode: FakeTensorMode = field(init=False)
    _memo: dict[Any, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.liveness = analyze(self.graph_module)
        self.mode = fake_mode_of(self.graph_module.graph)
        self.values = _values(self.liveness.schedule)
        self.position = {node: index for index, node in enumerate(self.liveness.schedule)}

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def device(self) -> torch.device:
        """The device of most of what the graph holds."""
        return device_of(self.graph_module)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of most bytes that the graph makes."""
        made: Counter[torch.dtype] = Counter()
        for value in self.values:
            for tensor in tensors_of(value.call.out):
                made[tensor.dtype] += bytes_of(tensor)
        return max(made, key=made.__getitem__, default=torch.float32)

    @cached_property
    def launches(self) -> list[int]:
        """Kernels that each node launches."""
        return [launches_of(value.node) for value in self.values]

    @cached_property
    def live_bytes(self) -> list[int]:
        """Bytes live during each node."""
        live = self.liveness.live_bytes()
        if not self.at_home:
            return live
        for storage in (self.liveness.storages[s] for s in self.at_home):
            for index in range(storage.birth, storage.death + 1):
                live[index] -= storage.bytes
        return [held + used for held, used in zip(live, self._used, strict=True)]

    @cached_property
    def _used(self) -> list[int]:
        """Bytes that each node has in memory of what counts as in files."""
        sizes = {self.liveness.storages[s].key: self.liveness.storages[s].bytes for s in self.at_home}
        if not sizes:
            return [0] * len(self.values)
        return [sum(sizes.get(key, 0) for key, _ in touched(value.node)) for value in self.values]

    def is_worth_a_loop(self, index: int, least: float) -> bool:
        """Whether a node by itself may be: it has a large workspace, or large values in memory that are in files."""
        return self.liveness.transient[index] + self._used[index] >= least

    @cached_property
    def at_home(self) -> frozenset[int]:
        """The storages that count as if they were in files."""
        storages = enumerate(self.liveness.storages)
        return frozenset(
            index for index, each in storages if each.bytes >= self.home_bytes and each.death < len(self.values)
        )

    @cached_property
    def peak_bytes(self) -> int:
        """The most that is live during any node."""
        return max(self.live_bytes)

    @cached_property
    def cut_bytes(self) -> list[int]:
        """Bytes live across the boundary before each position, and after the last."""
        changes = [0] * (len(self.values) + 1)
        for index, storage in enumerate(self.liveness.storages):
            if index in self.at_home:
                continue
            changes[storage.birth + 1] += storage.bytes
            if storage.death + 1 <= len(self.values):
                changes[storage.death + 1] -= storage.bytes
        total, bytes_at = 0, []
        for change in changes:
            total += change
            bytes_at.append(total)
        return bytes_at

    @cached_property
    def born(self) -> list[tuple[int, ...]]:
        """Storages that each position makes."""
        born: list[list[int]] = [[] for _ in self.values]
        for index, storage in enumerate(self.liveness.storages):
            born[storage.birth].append(index)
        return [tuple(made) for made in born]

    @cached_property
    def born_bytes(self) -> list[int]:
        """Bytes of the storages that each position makes."""
        return [sum(self.liveness.storages[s].bytes for s in made) for made in self.born]

    @cached_property
    def value_bytes(self) -> list[int]:
        """Bytes of each position's value."""
        return [bytes_of(value.node.meta["val"]) for value in self.values]

    @cached_property
    def reads(self) -> list[tuple[int, ...]]:
        """Of each position, those that it reads (-1: weights and inputs)."""
        return [tuple(self.position.get(node, -1) for node in value.reads) for value in self.values]

    def layout(self, node: fx.Node, piece: Slice) -> Any:
        """``slice_layout`` of a node's value."""
        key = (node, piece)
        if key not in self._memo:
            self._memo[key] = slice_layout(node.meta["val"], piece)
        return self._memo[key]

    @cached_property
    def edges(self) -> list[tuple[tuple[fx.Node, int, int], ...]]:
        """Of each position, the nodes that it reads, with their positions (-1: weights and inputs) and bytes."""
        return [
            tuple((node, at, bytes_of(node.meta["val"])) for node, at in zip(value.reads, reads, strict=True))
            for value, reads in zip(self.values, self.reads, strict=True)
        ]

    def is_view(self, index: int) -> bool:
        """Whether the node makes no storage of its own."""
        return not self.born[index]

    @cached_property
    def dying(self) -> list[tuple[int, ...]]:
        """Storages that each position is the last to use."""
        dying: list[list[int]] = [[] for _ in range(len(self.values) + 1)]
        for index, storage in enumerate(self.liveness.storages):
            dying[storage.death].append(index)
        return [tuple(last) for last in dying]

    @cached_property
    def traffic(self) -> list[tuple[int, int]]:
        """Bytes that each node reads and writes: of activations, and of weights. A view moves nothing."""
        return [self._traffic(index) for index in range(len(self.values))]

    def _traffic(self, index: int) -> tuple[int, int]:
        if self.is_view(index):
            return 0, 0
        activations, weights = sum(self.liveness.storages[s].bytes for s in self.born[index]), 0
        value = self.values[index]
        for node, tensor in zip(value.reads, value.call.tensors, strict=False):
            size = tensor.numel() * tensor.element_size()
            if node.op == "get_attr":
                weights += size
            else:
                activations += size
        return activations, weights

    def transient(self, index: int, out: Slice, cut: Cut) -> tuple[float, float]:
        """Workspace of a sliced node: bytes that any slice needs, and bytes for each step of the axis in it.

        An estimate: of what makes no difference to the peak each step has its share, and no kernel is run for it.
        """
        whole = self.liveness.transient[index]
        short = max(1, out.extent // 16)
        if whole < ASKED_SHARE * self.peak_bytes or short == out.extent:
            return 0.0, whole / out.extent
        key = (self.values[index].layout, out)
        if key not in self._memo:
            least = self._workspace(self.values[index].call, out, cut, short)
            step = max(0.0, (whole - least) / (out.extent - short))
            self._memo[key] = max(0.0, least - step * short), step
        return self._memo[key]

    def least_steps(self, index: int, out: Slice, cut: Cut) -> int:
        """Steps of the axis that a slice needs for the kernel of the whole node, where a smaller one takes a slower."""
        value = self.values[index]
        piece = cut.inputs[0] if value.call.target in CONVOLUTIONS else None
        if piece is None:
            return 0
        key = ("steps", value.key, out)
        if key not in self._memo:
            whole = value.call.tensors[0].shape

            def is_fast(length: int) -> bool:
                start = (out.extent - length) // 2
                first, last = cut.window((start, start + length))
                return not convolves_plainly(value.call.target, value.call.args, piece.resized(whole, last - first))

            lengths = range(1, out.extent + 1)
            self._memo[key] = bisect_left(lengths, True, key=is_fast) + 1 if is_fast(out.extent) else 0
        return self._memo[key]

    def _workspace(self, call: Call, out: Slice, cut: Cut, length: int) -> int:
        if not isinstance(call.target, OpOverload) or not isinstance(call.out, torch.Tensor):
            return 0
        part = ((out.extent - length) // 2, (out.extent + length) // 2)
        window = cut.window(part)
        with torch.no_grad(), self.mode:
            parts = iter(
                x if piece is None else _part(self.mode, x, piece, window[1] - window[0])
                for x, piece in zip(call.tensors, cut.inputs, strict=True)
            )
            leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
            leaves = [next(parts) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            args, kwargs = with_arguments(call.target, args, kwargs, cut.place(part, window)[0])
            result = _part(self.mode, call.out, out, part[1] - part[0])
            return call_workspace_bytes(call.target, result, args, kwargs)

    @cached_property
    def flops(self) -> list[int]:
        """Floating point operations of each node's convolutions, matrix products and attention."""
        counted = flops(self.graph_module)
        return [counted.get(value.node, 0) for value in self.values]

    def backward(self, index: int, out: Slice) -> Cut | None:
        """The rule's cut for a slice of the node's output."""
        value = self.values[index]
        key = (value.key, out)
        if key not in self._memo:
            self._memo[key] = None if draws(value.node) else backward(value.call, out)
        return self._memo[key]

    def forward(self, index: int, known: Mapping[int, Slice]) -> tuple[Slice, Cut] | None:
        """The slice of the node's output that reads just the slices known of its inputs."""
        value = self.values[index]
        key = (value.key, tuple(known.items()))
        if key not in self._memo:
            self._memo[key] = None if draws(value.node) else forward(value.call, known)
        return self._memo[key]


def _part(mode: FakeTensorMode, whole: torch.Tensor, piece: Slice, length: int) -> torch.Tensor:
    """A tensor of the size of a slice, dense in the whole's order of dimensions."""
    size, stride = piece.resized(whole.shape, length), list(whole.stride())
    step = 1
    for dim in sorted(range(whole.ndim), key=lambda dim: (whole.stride(dim), -dim)):
        stride[dim] = step
        step *= size[dim]
    return fake_tensor(mode, size, stride, whole.dtype, whole.device)


def _values(schedule: Iterable[fx.Node]) -> list[Value]:
    numbers: dict[Any, int] = {}
    values = []
    for node in schedule:
        leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
        reads = tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node) and not is_generator(leaf))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda argument: argument.meta["val"])
        call = Call(node.target, args, kwargs, node.meta["val"])  # type: ignore[arg-type]
        key = numbers.setdefault(_key(node, call), len(numbers))
        strides = tuple(tensor.stride() for tensor in call.tensors if isinstance(tensor, torch.Tensor))
        values.append(Value(node, call, reads, key, numbers.setdefault((key, strides), len(numbers))))
    return values


def is_generator(node: fx.Node) -> bool:
    """Whether a node gives a generator of random numbers, and no tensor."""
    return isinstance(node.meta.get("val"), torch.Generator)


def _key(node: fx.Node, call: Call) -> Any:
    if not isinstance(node.target, OpOverload):
        return node
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    known = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves)
    key = (node.target, known, tuple(node.kwargs), _shapes(call.out))
    try:
        hash(key)
    except TypeError:
        return node
    return key


def _shapes(value: Any) -> tuple[Any, ...]:
    return tuple(tuple(x.shape) for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor))


def is_getitem(node: fx.Node) -> bool:
    """Whether the node picks one of a call's several results."""
    return node.op == "call_function" and node.target is operator.getitem
