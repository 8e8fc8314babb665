"""Fetches: a graph with its weights in their homes, and nodes that bring them to the device for their uses.

A fetch is begun at one node and waited for at another, so that it runs beside what is between. What it brings is a
storage of its own, born where it is begun. A loop is given what was fetched before it; in a body that fetches, it is
given the weight where it is at home.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import fx, nn

from fxstream.passes.graph.capture import rebuilt
from fxstream.passes.graph.effects import memories
from fxstream.passes.graph.liveness import loop_of
from fxstream.passes.graph.propagate import evaluate, fake_mode_of, fake_tensor
from fxstream.passes.planning.homes import Path, Stay, home_nodes
from fxstream.runtime.fetch import fetch, fetched
from fxstream.runtime.loop import SlicedLoop


def insert_fetches(graph_module: fx.GraphModule, stays: Sequence[Stay], path: Path = ()) -> fx.GraphModule:
    """A new graph module that fetches weights for their stays on the device; the other weights are shared.

    ``stays`` are those of the graph at ``path`` and of all graphs in it.
    """
    return _Fetching(graph_module, stays, path).rewritten()


class _Fetching:
    def __init__(self, source: fx.GraphModule, stays: Sequence[Stay], path: Path) -> None:
        self.source, self.path, self.mode = source, path, fake_mode_of(source.graph)
        self.graph, self.env = fx.Graph(), dict[fx.Node, fx.Node]()
        self.inside = [stay for stay in stays if stay.path != path]
        self.begins, self.firsts = defaultdict[int, list[Stay]](list), defaultdict[int, list[Stay]](list)
        for stay in stays:
            if stay.path == path:
                self.begins[stay.begin].append(stay)
                self.firsts[stay.first].append(stay)
        self.homes = home_nodes(source, {stay.weight.storage for stay in stays if stay.path == path})
        self.started: dict[Stay, fx.Node] = {}
        self.present: dict[fx.Node, fx.Node] = {}

    def rewritten(self) -> fx.GraphModule:
        nodes, loops = self.source.graph.nodes, dict[str, nn.Module]()
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                self.env[node] = self.graph.node_copy(node)
        schedule = [node for node in nodes if node.op in ("call_function", "call_module", "call_method")]
        for position, node in enumerate(schedule):
            for stay in self.begins[position]:
                self._begin(stay, schedule[stay.first])
            for stay in self.firsts[position]:
                self._wait(stay)
            if self._lies_in_a_fetched(node):
                continue  # a view, which is taken where it is read
            inside = [stay for stay in self.inside if stay.path[len(self.path)] == node.name]
            if inside:
                at_home = {stay.weight.storage for stay in inside}
                loops[str(node.target)] = self._loop(node, inside)
                self.env[node] = self.graph.node_copy(node, partial(self._given, at_home))
            else:
                self.env[node] = self.graph.node_copy(node, self._read)
        self.graph.node_copy(self.source.graph.output_node(), self._read)
        return rebuilt(self.source, self.graph, "Fetching", loops)

    def _begin(self, stay: Stay, reader: fx.Node) -> None:
        home = self.homes[stay.weight.storage]
        value = home.meta["val"]
        node = self.started[stay] = self.graph.call_function(fetch, (self.env[home],))
        here = fake_tensor(self.mode, value.shape, value.stride(), value.dtype, value.device)
        node.meta = {**reader.meta, "val": here}

    def _wait(self, stay: Stay) -> None:
        started = self.started.pop(stay)
        node = self.graph.call_function(fetched, (started,))
        node.meta = dict(started.meta)
        for each in [each for each in self.present if stay.weight.storage in memories(each.meta["val"])]:
            del self.present[each]
        self.present[self.homes[stay.weight.storage]] = node

    def _loop(self, node: fx.Node, stays: Sequence[Stay]) -> SlicedLoop:
        loop = loop_of(self.source, node)
        path = (*self.path, node.name)
        return loop.with_bodies({name: insert_fetches(body, stays, path) for name, body in loop.graphs().items()})

    def _lies_in_a_fetched(self, node: fx.Node) -> bool:
        return not memories(node.meta.get("val")).isdisjoint(self.homes)

    def _given(self, at_home: set[int], node: fx.Node) -> fx.Node:
        """A node as it is given to a body, which fetches those weights itself, whether they are here or not."""
        if memories(node.meta["val"]).isdisjoint(at_home):
            return self._read(node)
        if node not in self.env:  # a view of a weight that is fetched here, too
            self.env[node] = self.graph.node_copy(node, partial(self._given, at_home))
        return self.env[node]

    def _read(self, node: fx.Node) -> fx.Node:
        """A node as it is read now: a view of a weight is taken of what was fetched."""
        if not self._lies_in_a_fetched(node):
            return self.env[node]
        if node not in self.present:
            copy = self.present[node] = self.graph.node_copy(node, self._read)
            with torch.no_grad(), self.mode:
                copy.meta["val"] = evaluate(copy)
        return self.present[node]
