"""Launches: how many kernels a graph runs. A view runs none, an operator one, as a rule, and a loop its body's a slice.

On a CPU a split norm counts as one launch, too: what its tiles cost is the memory that they move.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx

from fxstream.passes.graph.liveness import loop_of, tensors_of, touched
from fxstream.runtime import norm as _norm  # noqa: F401  (registers its operators)

aten, norm = torch.ops.aten, torch.ops.fxstream

FIXED: dict[Any, int] = {
    aten.group_norm.default: 3,
    norm.group_moments.default: 3,
    norm.group_statistics.default: 9,
    norm.group_scale.default: 4,
}
"""On CUDA: moments, factors and the scale of a norm, and of one that is split."""


def launches(graph_module: fx.GraphModule) -> int:
    """Kernels that a run of a graph launches."""
    if graph_module not in _KNOWN:
        nodes = (node for node in graph_module.graph.nodes if node.op in ("call_function", "call_module"))
        _KNOWN[graph_module] = sum(
            _of_loop(graph_module, node) if node.op == "call_module" else launches_of(node) for node in nodes
        )
    return _KNOWN[graph_module]


_KNOWN: WeakKeyDictionary[fx.GraphModule, int] = WeakKeyDictionary()
"""Of graphs that nobody changes any more."""


def _of_loop(graph_module: fx.GraphModule, node: fx.Node) -> int:
    loop = loop_of(graph_module, node)
    inside = {name: launches(body) for name, body in loop.graphs().items()}
    copies = len(loop.outputs) + sum(axis is not None and axis.outer > 1 for axis in loop.inputs)
    return sum(inside[step.body] + copies for step in loop.steps)


def launches_of(node: fx.Node) -> int:
    """Kernels that an operator launches, from the node's fake values; none where it makes nothing of its own."""
    if not any(touched(node)):
        return 0
    return FIXED.get(node.target, 1) if any(tensor.is_cuda for tensor in tensors_of(node.meta["val"])) else 1
