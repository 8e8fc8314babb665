"""Workspaces: memory that an operator's kernel allocates and frees again before it returns, as measured.

A kernel chooses what it allocates by its machine, its arguments, their layouts and their sizes; no formula holds on the
next machine. So a call is run on the device, on tensors of its layout. One that takes too long for that is measured
smaller: at two lengths of a dimension of its output, as the operator's rule makes inputs for those, and what it
allocates is taken to grow along that dimension as it did between them; where one dimension is not enough, along
several. Each answer is kept. For a card that isn't there, bounds stand in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fxstream.passes import operators as _rules  # noqa: F401  (registers the rules)
from fxstream.passes.machine import allocations
from fxstream.passes.machine.allocations import apart, workspace_of
from fxstream.passes.machine.bounds import bound_bytes, held, is_bounded
from fxstream.passes.machine.cost import computes_plainly, convolves_plainly
from fxstream.passes.machine.kept import Kept, Trace, folder, is_here, kept
from fxstream.passes.operators.axes import Call, Cut, Slice, backward, is_named, with_arguments

MOST_BYTES, MOST_FLOPS, SLOW = 16 << 20, 1 << 30, 8
FARTHEST = 16
"""A call that moves or computes more is measured smaller, or not at all if that many times more; what a FLOP
counts where torch's plain convolution does it."""


ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
"""Which converts reduced types block by block, and is as fast in them."""

Workspace = Callable[..., int]
_STATED: dict[OpOverload, Workspace] = {}


def workspace(*targets: OpOverload) -> Callable[[Workspace], Workspace]:
    """Register a function as the workspace of operators: called with the output's fake value, then the arguments.

    For operators of one's own, which may do more than compute and so are never run to be measured.
    """

    def register(function: Workspace) -> Workspace:
        for target in targets:
            _STATED[target] = function
        return function

    return register


def workspace_bytes(node: fx.Node) -> int:
    """Bytes that the kernel of ``node`` allocates for itself, from the node's fake values."""
    if not isinstance(node.target, OpOverload):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return call_workspace_bytes(node.target, node.meta["val"], args, kwargs)


def call_workspace_bytes(target: OpOverload, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes that the kernel of a call allocates for itself, from the call's fake values."""
    if target in _STATED:
        return _STATED[target](out, *args, **kwargs)
    device = next((x.device for x in pytree.tree_leaves((out, args, kwargs)) if isinstance(x, Tensor)), None)
    if device is None or _is_view(target):
        return 0
    key = (target, _alike(args, kwargs, lambda x: x.stride()), device.type, *_circumstances())
    if key not in _KNOWN:
        _KNOWN[key] = _asked(target, out, args, kwargs, device)
    return _KNOWN[key] or 0


_KNOWN: dict[Any, int | None] = {}


def _asked(target: OpOverload, out: Any, args: Any, kwargs: Any, device: torch.device) -> int | None:
    """The workspace of a call as it is measured, or bounded for a card that isn't there; None where it isn't known."""
    if device.type == "cuda" and not is_here("cuda"):
        return bound_bytes(target, out, args, kwargs)
    trace = _trace(target, args, kwargs, device)
    return None if trace is None else workspace_of(trace, held(out, but=(args, kwargs)))


def is_known(target: OpOverload, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the workspace of a call is known: its operator can be run here, or says what it allocates."""
    call_workspace_bytes(target, out, args, kwargs)
    device = next((x.device for x in pytree.tree_leaves((out, args, kwargs)) if isinstance(x, Tensor)), None)
    if device is not None and device.type == "cuda" and not is_here("cuda"):
        return target in _STATED or _is_view(target) or is_bounded(target, out, args, kwargs)
    key = (target, _alike(args, kwargs, lambda x: x.stride()), device and device.type, *_circumstances())
    return _KNOWN.get(key, 0) is not None


def _circumstances() -> tuple[Any, ...]:
    """What of torch's settings changes the kernels that it takes."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled,
        torch.get_float32_matmul_precision(),
    )


def _trace(target: OpOverload, args: Any, kwargs: Any, device: torch.device) -> Trace | None:
    """What a call allocates: as it is kept, or measured now. None where it can't be run here."""
    if not is_here(device.type):
        return None
    table = kept(device.type, folder())
    name = _name(target, args, kwargs)
    if name not in table.traces:
        table.refresh()
    if name not in table.traces:
        if target.namespace not in MEASURED and not is_named(target):
            table.traces[name] = None  # not for long: it may be told, or be another one of that name
            return None
        with unset_fake_temporarily():
            call = _on_meta(target, args, kwargs)
            try:
                trace = apart(lambda: _measure(call, device, table))
            except Exception:  # of any kernel
                trace = None
        if name not in table.traces:
            table.add(name, trace)
        table.save()
    return table.traces[name]


MEASURED = frozenset({"aten", "prims", "quantized", "quantized_decomposed", "mkldnn", "fxstream"})
"""Operators that do nothing but compute, by their namespaces. Those of a user may do more, and are not run, and of
those of other libraries the ones that are known by name alone."""


def _is_view(target: OpOverload) -> bool:
    """Whether what a call returns is what it was given, or a copy of that: a view allocates nothing else."""
    return all(each.alias_info is not None for each in target._schema.returns)


def _alike(args: Any, kwargs: Any, stride: Callable[[Tensor], Any]) -> Any:
    """Equal for arguments that kernels can't tell apart, the values of tensors aside."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    known = tuple(
        (tuple(x.shape), stride(x), str(x.dtype).removeprefix("torch."), "grad" * x.requires_grad)
        if isinstance(x, Tensor)
        else repr(x)
        for x in leaves
    )
    return known, spec


def _name(target: OpOverload, args: Any, kwargs: Any) -> str:
    """A call by its operator and arguments, and what else decides what its kernel allocates."""
    known, _ = _alike(args, kwargs, lambda x: tuple(restrided(x.shape, x.stride(), x.shape)))
    return f"{target} {known} {tuple(kwargs)} {_circumstances()}"


def _on_meta(target: OpOverload, args: Any, kwargs: Any) -> Call:
    """The call on tensors that have no memory, strides kept as far as they make a difference."""

    def meta(x: Tensor) -> Tensor:
        stride = restrided(x.shape, x.stride(), x.shape)
        return torch.empty_strided(x.shape, stride, dtype=x.dtype, device="meta", requires_grad=x.requires_grad)

    args, kwargs = pytree.tree_map_only(Tensor, meta, (tuple(args), dict(kwargs)))
    args, kwargs = pytree.tree_map_only(torch.Generator, lambda generator: None, (args, kwargs))  # not the user's own
    return Call(target, args, kwargs, None)


def _on_meta_too(target: OpOverload, args: Any, kwargs: Any) -> Any:
    """What the call returns, computed nowhere: what it makes of no tensor has no memory either, and draws nothing."""
    placed = any(argument.name == "device" for argument in target._schema.arguments)
    return target(*args, **({**kwargs, "device": torch.device("meta")} if placed else kwargs))


def restrided(shape: Sequence[int], stride: Sequence[int], new: Sequence[int]) -> list[int]:
    """Strides of a tensor of another shape that lies in memory like this one: the same order, gaps where it has any.

    How wide a gap is makes no difference: it becomes as wide as what lies before it.
    """
    result, dense, new_dense = list(stride), 1, 1
    for dim in sorted(range(len(shape)), key=lambda dim: (stride[dim], -dim)):
        if stride[dim] >= dense:
            result[dim] = new_dense * (1 if stride[dim] == dense else 2)
            dense, new_dense = stride[dim] * shape[dim], result[dim] * new[dim]
    return result


@dataclass
class _Cost:
    bytes: int
    flops: int

    def share(self, part: float) -> bool:
        """Whether that part of it can be measured."""
        return self.bytes * part <= MOST_BYTES and self.flops * part <= MOST_FLOPS


def _measure(call: Call, device: torch.device, table: Kept) -> Trace:
    name = _name(call.target, call.args, call.kwargs)
    trace = table.traces.get(name)
    if trace is None:
        trace = _grown(call, device, table)
        table.add(name, trace)
    return trace


def _grown(call: Call, device: torch.device, table: Kept) -> Trace:
    """What a call allocates, of itself or as it grows from smaller ones."""
    call, cost = _costed(call)
    if cost.share(1):
        return allocations.trace_of(call.target, call.args, call.kwargs, device)
    least = 1 << (max(2, torch.get_num_threads()) - 1).bit_length()
    for dim, cut in _cuts(call):
        size = call.shape[dim]
        high = 1 << ((size - 1).bit_length() - 1)
        while high > 2 * least and not cost.share(high / size):
            high //= 2
        if size < 3:
            continue
        (short, few), (long, many) = (_smaller(call, cut, dim, length) for length in (high // 2, high))
        if not few < many < size:
            continue
        low, top = _measure(short, device, table), _measure(long, device, table)
        grown = _line(low, top, (size - many) / (many - few))
        if grown is not None:
            return grown
    if not cost.share(1 / FARTHEST):
        raise RuntimeError(f"{call.target} can't be measured smaller")
    return allocations.trace_of(call.target, call.args, call.kwargs, device)


def _line(low: Trace, top: Trace, steps: float) -> Trace | None:
    """What a trace that grew from ``low`` to ``top`` becomes, or None where the kernel does other things there."""
    if len(low) != len(top):
        return None
    grown = tuple(round(b + (b - a) * steps) for a, b in zip(low, top, strict=True))
    return None if any(a * b < 0 for a, b in zip(grown, top, strict=True)) else grown


def _costed(call: Call) -> tuple[Call, _Cost]:
    """The call with what it returns, and its cost."""
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            out = _on_meta_too(call.target, call.args, call.kwargs)
    except (RuntimeError, NotImplementedError):  # the operator can't be told without running it
        out = ()
    tensors = [x for x in pytree.tree_leaves((call.args, call.kwargs, out)) if isinstance(x, Tensor)]
    plain = bool(call.tensors) and (
        convolves_plainly(call.target, call.args, call.tensors[0].shape)
        or (computes_plainly(call.tensors[0].dtype) and call.target is not ATTENTION)
    )
    slow = SLOW if plain else 1
    cost = _Cost(sum(x.numel() * x.element_size() for x in tensors), slow * counter.get_total_flops())
    return Call(call.target, call.args, call.kwargs, out), cost


def _cuts(call: Call) -> list[tuple[int, Cut]]:
    """Dimensions of the output that can be made smaller, and how: those first that the first input has too."""
    found = []
    for dim, size in enumerate(call.shape if isinstance(call.out, Tensor) else ()):
        cut = backward(call, Slice(dim, size)) if size > 1 else None
        if cut is not None and any(piece is not None for piece in cut.inputs):
            found.append((dim, cut))
    return sorted(found, key=lambda each: each[1].inputs[0] is None)


def _smaller(call: Call, cut: Cut, dim: int, length: int) -> tuple[Call, int]:
    """A call that computes the first ``length`` steps of the output, or some more; and how many."""
    part = (0, length)
    first, last = cut.window(part)
    parts = iter(
        x if piece is None else _resized(x, piece.resized(x.shape, last - first))
        for x, piece in zip(call.tensors, cut.inputs, strict=True)
    )
    args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(parts), (call.args, dict(call.kwargs)))
    args, kwargs = with_arguments(call.target, args, kwargs, cut.place(part, (first, last))[0])
    out = _on_meta_too(call.target, args, kwargs)
    smaller = Call(call.target, args, kwargs, out)
    return smaller, smaller.shape[dim]


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    stride = restrided(tensor.shape, tensor.stride(), shape)
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
