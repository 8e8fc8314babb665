"""FLOPs: what each node computes, by torch's own formulas on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fxstream.passes.graph.propagate import arguments, fake_mode_of

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What torch has no formula for under its name: the CPU's attention kernel, which counts as a GPU's does."""


def flops(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """Floating-point operations of each node of a captured graph: products, convolutions and attention.

    What torch has no formula for (norms, pointwise operators) counts as none, as in ``FlopCounterMode``.
    """
    known: dict[Any, int] = {}
    counted = {}
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.no_grad(), fake_mode_of(graph_module.graph), counter:
        for node in graph_module.graph.nodes:
            if node.op != "call_function":
                continue
            if not isinstance(node.target, OpOverload) or torch.Tag.pointwise in node.target.tags:
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


def _key(node: fx.Node) -> Any:
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    given = tuple(_layout(leaf.meta["val"]) if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves)
    return node.target, tuple(node.kwargs), given


def _layout(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return tuple(value.shape), value.stride(), value.dtype, value.device
