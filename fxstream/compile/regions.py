"""The streamed modules that torch.compile may meet in a graph, by their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from fxstream.budget import Budget
    from fxstream.report import Plan

REGIONS: WeakValueDictionary[int, Region] = WeakValueDictionary()
"""The regions of torch.compile's graphs that streamed modules are, by their tokens."""


@dataclass(eq=False)
class Region:
    """A streamed module as torch.compile sees it: what it is planned with, and what becomes of it."""

    budget: Budget
    backend: str | None
    allow_recompute: bool = False
    plans: list[Plan] = field(default_factory=list)
    graphs: list[Any] = field(default_factory=list)
    token: int = field(default_factory=count().__next__)

    def __post_init__(self) -> None:
        REGIONS[self.token] = self
