"""Lookups: tables that are only indexed stay at home, and the rows that are asked for are read from there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import fx

from fxstream.passes.graph.capture import rebuilt
from fxstream.passes.graph.effects import memories
from fxstream.passes.graph.liveness import bytes_of
from fxstream.passes.planning.homes import Lookup
from fxstream.runtime.lookup import LOOKUP

aten = torch.ops.aten


def look_up(graph_module: fx.GraphModule, kept: Collection[str] = ()) -> tuple[fx.GraphModule, tuple[Lookup, ...]]:
    """A graph module that looks rows up in tables at home, and what it looks up; the same one where it has none.

    Tables of the names ``kept`` are left alone, and those of which all is read, or as much.
    """
    nodes = graph_module.graph.nodes
    shared = Counter(key for node in graph_module.graph.find_nodes(op="get_attr") for key in memories(node.meta["val"]))
    found = {
        reader
        for table in graph_module.graph.find_nodes(op="get_attr")
        if str(table.target) not in kept and all(shared[key] == 1 for key in memories(table.meta["val"]))
        if _is_looked_up(table)
        for reader in table.users
    }
    if not found:
        return graph_module, ()
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node in found:
            env[node].target, env[node].args, env[node].kwargs = LOOKUP, env[node].args[:2], {}
    lookups = tuple(Lookup(str(node.args[0].target), bytes_of(node.meta["val"])) for node in nodes if node in found)
    return rebuilt(graph_module, graph, "LookingUp"), lookups


def _is_looked_up(table: fx.Node) -> bool:
    """Whether a weight is a table of rows of which each reader takes some, fewer than there are."""
    value = table.meta["val"]
    if value.dim() != 2 or not value.is_contiguous() or bytes_of(value) != value.untyped_storage().nbytes():
        return False
    return bool(table.users) and all(
        user.target is aten.embedding.default
        and user.args[0] is table
        and user.args[1] is not table
        and bytes_of(user.meta["val"]) < bytes_of(value)
        for user in table.users
    )
