"""FLOPs: what each node computes, by torch's own formulas on fake tensors."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from fxstream.passes.graph.propagate import arguments, fake_mode_of

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What torch has no formula for under its name: the CPU's attention kernel, which counts as a GPU's does."""


_KNOWN: WeakKeyDictionary[FakeTensorMode, dict[Any, int]] = WeakKeyDictionary()
"""Of each fake mode: calls, by what their FLOPs depend on -> FLOPs."""


def flops(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """Floating-point operations of each node of a captured graph: products, convolutions and attention.

    What torch has no formula for (norms, pointwise operators) counts as none, as in ``FlopCounterMode``.
    """
    mode = fake_mode_of(graph_module.graph)
    known = _KNOWN.setdefault(mode, {})
    counted = {}
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.no_grad(), mode, counter:
        for node in graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            if isinstance(node.meta.get("val"), torch.Generator) or not _may_count(node.target):
                counted[node] = 0
                continue
            key = _key(node)
            if key not in known:
                before = counter.get_total_flops()
                args, kwargs = arguments(node)
                node.target(*args, **kwargs)
                known[key] = counter.get_total_flops() - before
            counted[node] = known[key]
    return counted


@cache
def _may_count(target: Any) -> bool:
    """Whether torch has a formula for an operator, or it may be made of operators that have one."""
    if not isinstance(target, OpOverload):
        return True
    made_of = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return made_of or target.overloadpacket in flop_registry or target.overloadpacket in FORMULAS


def _key(node: fx.Node) -> Any:
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    given = tuple(_layout(leaf.meta["val"]) if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves)
    return node.target, tuple(node.kwargs), given


def _layout(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return tuple(value.shape), value.stride(), value.dtype, value.device
