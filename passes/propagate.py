"""Propagation: fill in the fake value of every node of a graph, from its placeholders' and weights' on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the values of a captured graph live in."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


def arguments(node: fx.Node) -> tuple[Any, Any]:
    """A node's args and kwargs, with the values of nodes in their place."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda argument: argument.meta["val"])
    return args, kwargs


def evaluate(node: fx.Node) -> Any:
    """The fake value of a ``call_function`` node, from its arguments' values. Call under the graph's fake mode.

    What a call makes anew is told once for all calls that are alike; a view is taken of its own source.
    """
    args, kwargs = arguments(node)
    assert callable(node.target)
    mode, key = _alike(node.target, args, kwargs)
    known = {} if mode is None else _KNOWN.setdefault(mode, {})
    if mode is not None and key in known:
        return fake_tensor(mode, *known[key])
    value = node.target(*args, **kwargs)
    if node.target in VIEWS and 1 in value.shape:
        return _restrided(value, node.target, args, kwargs)
    if key is not None and type(value) is FakeTensor and _is_new(value, args, kwargs):
        known[key] = tuple(value.shape), value.stride(), value.dtype, value.device
    return value


_KNOWN: WeakKeyDictionary[FakeTensorMode, dict[Any, Any]] = WeakKeyDictionary()
"""Of each fake mode: calls of operators -> size, stride, dtype and device of the tensor that they make."""


def _alike(target: Any, args: Any, kwargs: Any) -> tuple[FakeTensorMode | None, Any]:
    """The fake mode of a call, and a value equal for calls whose results are alike; None where that isn't known."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)
    if not isinstance(target, OpOverload) or any(_is_other_tensor(leaf) for leaf in leaves):
        return mode, None
    known = tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
        if isinstance(leaf, FakeTensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )
    try:
        hash(known)
    except TypeError:
        return mode, None
    return mode, (target, known, spec)


def _is_other_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and type(leaf) is not FakeTensor


def _is_new(value: torch.Tensor, args: Any, kwargs: Any) -> bool:
    """Whether a call's result lies in storage of its own, from its start on, all of it."""
    given = {
        leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
    }
    size = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    storage, whole = value.untyped_storage(), value.untyped_storage().nbytes() == size * value.element_size()
    return storage._cdata not in given and whole and value.numel() > 0 and not value.requires_grad


def fake_tensor(
    mode: FakeTensorMode, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> FakeTensor:
    """``torch.empty_strided`` under a fake mode, without the time that dispatching to the mode takes."""
    with unset_fake_temporarily():
        return FakeTensor(mode, torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)


def _restrided(value: torch.Tensor, target: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """A fake view with the strides that the real one has in dimensions of size 1: kernels choose layouts by them."""
    source, *rest = args
    with unset_fake_temporarily():
        meta = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
        stride = target(meta, *rest, **kwargs).stride()
    return value if stride == value.stride() else value.as_strided(value.shape, stride)


def propagate(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> None:
    """Set ``meta["val"]`` of the ``call_function`` nodes (all, or those given in schedule order)."""
    with torch.no_grad(), fake_mode_of(graph):
        for node in graph.nodes if nodes is None else nodes:
            if node.op == "call_function":
                node.meta["val"] = evaluate(node)
