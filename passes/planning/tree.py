"""The tree of a plan: a block is a graph with loops in it, and what became of a loop's body is a block again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxstream.passes.graph.liveness import MemoryProfile
from fxstream.passes.planning.grouping import Group
from fxstream.passes.planning.program import Program
from fxstream.runtime.loop import SlicedLoop


@dataclass(frozen=True, eq=False)
class Loop:
    """A group as it runs: ``name`` is that of its node, ``module`` what the node calls.

    ``body`` is what became of the body that holds most, where bodies were streamed in turn.
    """

    name: str
    group: Group
    module: SlicedLoop
    body: Block | None = None

    @property
    def added_flops(self) -> int:
        """Operations that recomputing adds, in all slices."""
        return self.body.added_flops * len(self.group.lengths) if self.body else 0


@dataclass(frozen=True)
class Spill:
    """An activation at home: the ``name`` of the node that makes it, of the user's ``module_path``, and its bytes.

    ``moved`` are those that are written there, and read from there.
    """

    name: str
    module_path: str
    bytes: int
    moved: int


@dataclass(frozen=True, eq=False)
class Block:
    """A graph as it runs: ``program``, with ``loops`` in place of intervals of its schedule.

    ``after`` is its memory. ``recomputed_flops`` are the operations of the program that were not in the graph given,
    ``spills`` the activations that live in files.
    """

    graph_module: fx.GraphModule
    program: Program
    after: MemoryProfile
    loops: tuple[Loop, ...] = ()
    recomputed_flops: int = 0
    spills: tuple[Spill, ...] = ()

    @property
    def added_flops(self) -> int:
        """Operations that recomputing adds, those in the slices of loops with it."""
        return self.recomputed_flops + sum(loop.added_flops for loop in self.loops)

    def intervals(self) -> Iterator[tuple[int, int, int]]:
        """Of each node as it runs that stands for nodes of the program: their first and last, and the bytes live then.

        Those that only lead to or from a loop's values stand for none.
        """
        places = {value.node.name: (index, index) for index, value in enumerate(self.program.values)}
        places |= {loop.name: (loop.group.start, loop.group.end) for loop in self.loops}
        for name, live in zip(self.after.nodes, self.after.live_bytes, strict=True):
            if name in places:
                yield *places[name], live
