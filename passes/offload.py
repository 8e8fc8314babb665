"""Offload: a graph streamed and its weights placed together, so that both stay within one budget.

Half of the limit is given to activations, or a half of that where the weights that a node needs don't fit beside them,
and so on: small slices cost time, while weights are fetched beside the kernels. Loops are sought side by side first,
which fetch a weight once. A loop around nearly all of the graph fetches in its body, once a slice, and is taken where
the budget asks for it. Tables are looked up where they are, whatever the limit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import fx

from fxstream.passes.graph.liveness import profile
from fxstream.passes.planning.homes import Homes, place_weights
from fxstream.passes.planning.tree import Block, Loop
from fxstream.passes.rewriting.fetches import insert_fetches
from fxstream.passes.rewriting.lookups import look_up
from fxstream.passes.stream import SLACK, Search, stream
from fxstream.runtime.loop import SlicedLoop


def offload(
    graph_module: fx.GraphModule, limit: int | None, allow_recompute: bool = False, kept: Collection[str] = ()
) -> tuple[Block, Homes]:
    """Rewrite a normalized graph until it holds at most ``limit`` bytes with its weights, over its inputs.

    ``None`` asks for the lowest reachable. Where the limit can't be met, the result is the lowest reached. Weights of
    the names ``kept`` stay where they are.
    """
    graph_module, lookups = look_up(graph_module, kept)
    block, homes = _within(graph_module, limit, allow_recompute, kept)
    return block, replace(homes, lookups=lookups)


def _within(
    graph_module: fx.GraphModule, limit: int | None, allow_recompute: bool, kept: Collection[str]
) -> tuple[Block, Homes]:
    weights = profile(graph_module).weight_bytes
    found: list[tuple[int, int, Block, tuple[Block, Homes]]] = []
    for streamed in _streamed(graph_module, limit, weights, allow_recompute):
        placed = _placed(streamed, limit, kept)
        if limit is not None and placed[1].peak_bytes <= limit:
            return placed
        found.append((placed[1].peak_bytes, len(found), streamed, placed))
    least, _, streamed, placed = min(found)
    # The lowest is met within one per cent, for the least that is moved.
    return placed if limit is not None else _placed(streamed, int(SLACK * least), kept)


def _placed(streamed: Block, limit: int | None, kept: Collection[str]) -> tuple[Block, Homes]:
    """A streamed block with its weights placed; what it holds is told by the graph that comes of it."""
    homes = place_weights(streamed.graph_module, limit, kept)
    block = _fetching(streamed, insert_fetches(streamed.graph_module, homes.stays)) if homes.stays else streamed
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


def _fetching(block: Block, graph_module: fx.GraphModule) -> Block:
    """The block as it runs with fetches in its graph, and in the bodies of its loops."""
    loops = tuple(_loop_fetching(loop, graph_module) for loop in block.loops)
    return replace(block, graph_module=graph_module, after=profile(graph_module), loops=loops)


def _loop_fetching(loop: Loop, graph_module: fx.GraphModule) -> Loop:
    module = graph_module.get_submodule(loop.name)
    assert isinstance(module, SlicedLoop)
    if module is loop.module:
        return loop
    (body,) = module.graphs().values()
    return replace(loop, module=module, body=loop.body and _fetching(loop.body, body))
