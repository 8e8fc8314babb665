"""Offload: a graph streamed and its weights placed together, so that both stay within one budget.

Half of the limit is given to activations, or a half of that where the weights that a node needs don't fit beside them,
and so on: small slices cost time, while weights are fetched beside the kernels. Loops are sought side by side first,
which fetch a weight once. A loop around nearly all of the graph fetches in its body, once a slice, and is taken where
the budget asks for it. Tables are looked up where they are, whatever the limit. Where slices and fetches can't meet it,
activations are spilled, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import fx

from fxstream.passes.graph.liveness import loop_at, profile
from fxstream.passes.planning.homes import Homes, place_weights
from fxstream.passes.planning.tree import Block, Loop
from fxstream.passes.rewriting.fetches import insert_fetches
from fxstream.passes.rewriting.lookups import look_up
from fxstream.passes.stream import LARGE_SHARE, SLACK, Search, Spilling, stream


def offload(
    graph_module: fx.GraphModule,
    limit: int | None,
    allow_recompute: bool = False,
    kept: Collection[str] = (),
    folder: str = "",
) -> tuple[Block, Homes]:
    """Rewrite a normalized graph until it holds at most ``limit`` bytes with its weights, over its inputs.

    ``None`` asks for the lowest reachable. Where the limit can't be met, the result is the lowest reached. Weights of
    the names ``kept`` stay where they are. Activations that live in files are in one of ``folder``, "" where temporary
    ones are.
    """
    graph_module, lookups = look_up(graph_module, kept)
    block, homes = _within(graph_module, limit, allow_recompute, kept, folder)
    return block, replace(homes, lookups=lookups)


def _within(
    graph_module: fx.GraphModule, limit: int | None, allow_recompute: bool, kept: Collection[str], folder: str
) -> tuple[Block, Homes]:
    found = []
    for block in _ways(graph_module, limit, allow_recompute, folder):
        placed = _placed(block, limit, kept)
        if limit is not None and placed[1].peak_bytes <= limit:
            return placed
        found.append((block, placed))
    block, placed = min(found, key=lambda each: each[1][1].peak_bytes)
    # The lowest is met within one per cent, for the least that is moved.
    return placed if limit is not None else _placed(block, int(SLACK * placed[1].peak_bytes), kept)


def _ways(graph_module: fx.GraphModule, limit: int | None, allow_recompute: bool, folder: str) -> Iterator[Block]:
    """Ways to stream a graph: those in memory, then those that spill, the largest values alone first."""
    before = profile(graph_module)
    yield from _streamed(graph_module, limit, before.weight_bytes, allow_recompute)
    for least in [LARGE_SHARE * before.peak_bytes] if limit is None else [limit / 4, limit / 16]:
        search = Search(graph_module, 0, Spilling(least, folder))
        for share in _shares(limit, before.weight_bytes):
            yield search.streamed(share, 0.0)


def _shares(limit: int | None, weights: int) -> Iterator[int | None]:
    """What activations may hold that are spilled, too: all that weights leave, half of the limit, as few as can be."""
    if limit is not None:
        yield from sorted({max(limit - weights, limit // 2), limit // 2}, reverse=True)
    yield None


def _placed(block: Block, limit: int | None, kept: Collection[str]) -> tuple[Block, Homes]:
    """A streamed block with its weights placed; what it holds is told by the graph that comes of it."""
    homes = place_weights(block.graph_module, limit, kept)
    if homes.stays:
        block = _rewritten(block, insert_fetches(block.graph_module, homes.stays))
    return block, replace(homes, peak_bytes=block.after.peak_bytes + block.after.weight_bytes)


def _streamed(graph_module: fx.GraphModule, limit: int | None, weights: int, allow_recompute: bool) -> Iterator[Block]:
    """Ways to stream a graph, the fastest first: slices are as large as they can be beside its weights."""
    if limit is not None and limit > weights:
        yield stream(graph_module, limit - weights, allow_recompute)
    search = Search(graph_module, most_outer=0)
    share = (limit or 0) // 2
    while share > 0:
        block = search.streamed(share, 0.0)
        if block.after.peak_bytes > share:
            break
        yield block
        share //= 2
    yield stream(graph_module, None, allow_recompute, most_outer=0)
    yield stream(graph_module, None, allow_recompute)


def _rewritten(block: Block, graph_module: fx.GraphModule) -> Block:
    """The block as it runs where its graph has become another, and the bodies of its loops with it."""
    loops = tuple(_loop_rewritten(loop, graph_module) for loop in block.loops)
    return replace(block, graph_module=graph_module, after=profile(graph_module), loops=loops)


def _loop_rewritten(loop: Loop, graph_module: fx.GraphModule) -> Loop:
    module = loop_at(graph_module, loop.name)
    if module is loop.module or loop.body is None:
        return replace(loop, module=module)
    bodies = loop.module.graphs().items()
    name = next(name for name, body in bodies if body is loop.body.graph_module)
    return replace(loop, module=module, body=_rewritten(loop.body, module.graphs()[name]))
