"""Propagation: fill in the fake value of every node of a graph, from its placeholders' and weights' on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from fxstream.passes.graph.layouts import layouts_on

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
    if isinstance(node.meta.get("val"), torch.Generator):
        return node.meta["val"]
    args, kwargs = arguments(node)
    target = node.target
    assert callable(target)
    mode, key = _alike(target, args, kwargs)
    known = {} if mode is None else _KNOWN.setdefault(mode, {})
    if mode is not None and key in known:
        return fake_tensor(mode, *known[key])
    value = target(*args, **kwargs)
    if target in VIEWS and 1 in value.shape:
        return _restrided(value, on_meta(target, *args, **kwargs).stride())
    layout = layouts_on(args[0].device).get(target) if args and isinstance(args[0], torch.Tensor) else None
    if layout is not None:
        value = _laid_out(value, on_meta(layout, *args, **kwargs).stride())
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
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.is_conj(), leaf.is_neg())
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


def _restrided(value: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """A fake value with the strides that the real one has, also in dimensions of size 1: kernels choose by them."""
    return value if tuple(stride) == value.stride() else value.as_strided(value.shape, stride)


def on_meta(function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """What torch's own kernels make of tensors of such layouts, outside of any fake mode."""
    with unset_fake_temporarily():
        args, kwargs = pytree.tree_map_only(torch.Tensor, _without_memory, (args, kwargs))
        return function(*args, **kwargs)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _laid_out(value: Any, stride: Sequence[int]) -> Any:
    """A fake result, or the first of several, with the kernel's strides."""
    if isinstance(value, tuple):
        return (_laid_out(value[0], stride), *value[1:])
    return _restrided(value, stride)


def propagate(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> None:
    """Set ``meta["val"]`` of the ``call_function`` nodes (all, or those given in schedule order)."""
    with torch.no_grad(), fake_mode_of(graph):
        for node in graph.nodes if nodes is None else nodes:
            if node.op == "call_function":
                node.meta["val"] = evaluate(node)


def propagate_layouts(graph_module: fx.GraphModule) -> None:
    """Propagate through what was traced without the backends that choose the layouts of convolutions.

    ``torch.export`` turns them off while it traces. Where the true layout has no such view, it is of a copy, as the
    reshape that it was traced from would have made.
    """
    graph = graph_module.graph
    mode = fake_mode_of(graph)
    FakeTensorMode.cache_clear()  # it does not know which backends were on
    if mode.shape_env is not None:
        mode.shape_env.fake_tensor_cache.clear()
    with torch.no_grad(), mode:
        for node in graph.nodes:
            if node.target is aten.view.default and not has_view(node.args[0].meta["val"], node.args[1]):
                _copy_first(node)
            if node.op == "call_function":
                node.meta["val"] = evaluate(node)
    graph_module.recompile()


def has_view(source: torch.Tensor, size: Any) -> bool:
    """Whether a tensor of that layout can be viewed so; a fake one accepts more than a real one."""
    try:
        on_meta(torch.Tensor.view, source, size)
    except RuntimeError:
        return False
    return True


def _copy_first(view: fx.Node) -> None:
    source: Any = view.args[0]
    with view.graph.inserting_before(view):
        copy = view.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    copy.meta = {**view.meta, "val": evaluate(copy)}
    view.replace_input_with(source, copy)
