"""The memory switches that components bring along: turned off where they would work against a plan, and on again.

A layer that computes its feed-forward in chunks, or a VAE that works in tiles or one frame after the other, was told to
from outside. A plan sees such work as a whole only where the switch is off; then it cuts it better, and exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

TILING = {"use_tiling": "tiling", "use_slicing": "slicing"}


def turn_off(module: nn.Module) -> tuple[list[str], Callable[[], None]]:
    """Turn a component's switches off; returns what they are called, and a function that turns them on again."""
    names: list[str] = []
    undo: list[Callable[[], None]] = []
    for sub in module.modules():
        for attribute, name in TILING.items():
            if getattr(sub, attribute, False) is True:
                setattr(sub, attribute, False)
                undo.append(partial(setattr, sub, attribute, True))
                names.append(name)
        size = getattr(sub, "_chunk_size", None)
        set_chunk: Any = getattr(sub, "set_chunk_feed_forward", None)
        if size is not None and callable(set_chunk):
            undo.append(partial(set_chunk, size, dim=getattr(sub, "_chunk_dim", 0)))
            set_chunk(None, dim=0)
            names.append("forward chunking")

    def turn_on() -> None:
        for step in undo:
            step()

    return list(dict.fromkeys(names)), turn_on
