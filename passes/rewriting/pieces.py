"""Pieces: the stretches of a schedule that a compiler may take at once.

A compiler that is given a whole graph runs it in an order of its own, and keeps what a sum is made of in place of the
sum: the peak is not the plan's any more. So it is given the stretches between kernels of their own (products,
convolutions, attention, loops), where it has all there is to fuse, and the graph around them runs as planned.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from fxstream.passes.graph.effects import has_effect
from fxstream.passes.graph.liveness import Liveness

aten = torch.ops.aten

KERNELS = {
    *flop_registry,
    *(aten.linear, aten.matmul, aten.mv, aten.einsum, aten.embedding, aten.scaled_dot_product_attention),
    *(aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
}
"""Operators that a compiler calls as they are."""


def find_pieces(liveness: Liveness) -> list[range]:
    """Stretches of the schedule, each with two or more nodes that compute something.

    Whatever a compiler keeps while it runs one, the peak of the graph is no higher: that holds for all that is live
    before the stretch and all that is made in it together.
    """
    born = [0] * len(liveness.schedule)
    before = [0] * (len(liveness.schedule) + 2)
    for storage in liveness.storages:
        born[storage.birth] += storage.bytes
        before[storage.birth + 1] += storage.bytes
        before[storage.death + 1] -= storage.bytes
    for index in range(1, len(before)):
        before[index] += before[index - 1]
    limit = max(liveness.live_bytes(), default=0)
    pieces = [_whole_calls(liveness.schedule, stretch) for stretch in _stretches(liveness, born, before, limit)]
    return [piece for piece in pieces if sum(born[index] > 0 for index in piece) > 1]


def _stretches(liveness: Liveness, born: list[int], before: list[int], limit: int) -> Iterator[range]:
    start, held = 0, 0
    for index, node in enumerate(liveness.schedule):
        fusible = _is_fusible(node)
        if index > start and (not fusible or held + born[index] > limit):
            yield range(start, index)
            start = index
        if not fusible:
            start = index + 1
        elif index == start:
            held = before[index]
        held += born[index]
    yield range(start, len(liveness.schedule))


def _whole_calls(schedule: Sequence[fx.Node], stretch: range) -> range:
    """The stretch, shortened until what picks one of a call's several results is in it with the call."""
    for index in stretch:
        inside = set(schedule[stretch.start : stretch.stop])
        if not isinstance(schedule[index].meta["val"], torch.Tensor) and not inside.issuperset(schedule[index].users):
            return range(stretch.start, index)
    return stretch


def _is_fusible(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    return not has_effect(node) and target.overloadpacket not in KERNELS
