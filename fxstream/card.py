"""Cards: what a budget in bytes means on CUDA, where it is all that the process holds of the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fxstream.budget import format_bytes
from fxstream.errors import DeviceMemoryError
from fxstream.passes.graph.liveness import device_of
from fxstream.passes.graph.reserve import Reserve, reserve_of
from fxstream.passes.machine.card import OVERHEAD
from fxstream.passes.planning.tree import Block

ROUNDS = 4
"""How often a plan is made again, to allocate less, where it would reserve more than there is."""


@contextmanager
def memory_errors(compiled: Any) -> Iterator[None]:
    """Where the card has no memory left for a planned call, say beside its plan what there is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        there = torch.cuda.is_available()
        free = torch.cuda.mem_get_info()[0] if there else 0
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()  # 0 without a card
        plan = getattr(compiled, "plan", None)
        planned = getattr(plan, "summary", plan.__str__)()
        raise DeviceMemoryError(
            f"the device is out of memory: {format_bytes(allocated)} are allocated, {format_bytes(reserved)} reserved "
            f"and {format_bytes(free)} free. The call was planned so:\n{planned}\nAsk for a lower budget, free "
            "what else is on the device, or set PYTORCH_ALLOC_CONF=expandable_segments:True before torch is imported",
            plan=plan,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            free_bytes=free,
        ) from error


def fit_to_card(stream: Callable[[int], Block], allowed: int, total: int, beside: int) -> tuple[Block, Reserve]:
    """A block that needs at most ``total`` bytes of a card, ``beside`` bytes held all the while; else the last tried.

    ``stream`` makes a block that allocates so many bytes at most, or as few as it can.
    """
    for _ in range(ROUNDS):
        block = stream(allowed)
        reserve = reserve_of(block.graph_module, (beside,))
        over = reserve.reserved + OVERHEAD - total
        if over <= 0 or block.after.peak_bytes > allowed:
            break
        allowed = max(1, min(allowed, block.after.peak_bytes) - over)
    return block, reserve


def is_on_card(graph_module: fx.GraphModule) -> bool:
    """Whether most of what a graph holds is on CUDA."""
    return device_of(graph_module).type == "cuda"
