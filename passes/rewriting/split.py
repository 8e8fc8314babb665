"""Split: one captured graph -> a full graph, which also returns a cut's values, and a skip graph, which takes them.

The full graph computes what the model does. The skip graph computes the same from the same inputs and the cut's values,
without what no longer counts: dead code. What draws or writes counts in both. Both take the captured graph's inputs;
the skip graph's are followed by the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import fx

from fxstream.passes.graph.capture import ROOT, module_path, seen_through, share_weights
from fxstream.passes.graph.effects import has_effect, stays
from fxstream.passes.graph.liveness import bytes_of, storages_of
from fxstream.passes.graph.propagate import fake_mode_of, propagate

aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """The two graphs of a cut. ``full`` returns the model's results and then one tensor for each value of the cut.

    ``nodes`` are the names of the cut's values in the captured graph, ``module_paths`` the modules that made them, and
    ``bytes`` what the values hold.
    """

    full: fx.GraphModule
    skip: fx.GraphModule
    nodes: tuple[str, ...]
    module_paths: tuple[str, ...]
    bytes: int


def split(graph_module: fx.GraphModule, cut: Sequence[fx.Node]) -> Split:
    """Split a normalized graph at values of its own. The graph is left as it is; weights are shared.

    Raises ``ValueError`` where the output does not depend on a value, or nothing is left to skip.
    """
    for node in cut:
        if node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor):
            raise ValueError(f"the cut at {node.name} is no value that the graph computes: name a computed tensor")
    skip = _skip(graph_module, cut)
    _check(graph_module, skip, cut)
    paths = tuple(module_path(node) for node in cut)
    size = sum(bytes_of(node.meta["val"]) for node in cut)
    return Split(returning(graph_module, cut), skip, tuple(node.name for node in cut), paths, size)


def returning(graph_module: fx.GraphModule, cut: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph with the cut's values among its outputs, dense, each in a storage that nothing else is returned in."""
    graph, env = _copied(graph_module, {})
    results = [env[node] for node in _results(graph_module.graph)]
    held = {key for node in results for key, _ in storages_of(node.meta["val"])}
    values = []
    for node in cut:
        value = env[node]
        ((key, size),) = storages_of(value.meta["val"])
        if key in held or size > bytes_of(value.meta["val"]) or _is_outside(value):
            value = _clone(graph, value)
        held.add(key)
        values.append(value)
    graph.output((*results, *values))
    return _module(graph_module, graph)


def _clone(graph: fx.Graph, value: fx.Node) -> fx.Node:
    copy = graph.call_function(aten.clone.default, (value,))
    copy.meta = dict(value.meta)
    return copy


def subgraph(graph_module: fx.GraphModule, values: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph that computes these values alone, from the same inputs, and runs beside the others.

    Raises ``ValueError`` where they need what has an effect, which would then take place twice.
    """
    graph, env = _copied(graph_module, {})
    graph.output(tuple(env[node] for node in values))
    made = _module(graph_module, graph, lambda node: node.op in ("placeholder", "output"))
    for node in made.graph.nodes:
        if has_effect(node):
            raise ValueError(
                f"{node.name} of {module_path(node) or 'the model'} draws random numbers or writes to a tensor, which "
                "a look at an early value would do a second time: give another schedule than a threshold"
            )
    return made


def _is_outside(value: fx.Node) -> bool:
    """Whether the value lies in an input or a weight."""
    keys = {key for key, _ in storages_of(value.meta["val"])}
    return any(
        not keys.isdisjoint(key for key, _ in storages_of(node.meta["val"]))
        for node in value.graph.nodes
        if node.op in ("placeholder", "get_attr")
    )


def _skip(graph_module: fx.GraphModule, cut: Sequence[fx.Node]) -> fx.GraphModule:
    graph, env = _copied(graph_module, {node: f"cut_{index}" for index, node in enumerate(cut)})
    propagate(graph)
    results = [env[node] for node in _results(graph_module.graph)]
    returned = {key for node in results for key, _ in storages_of(node.meta["val"])}
    held = [env[node] for node in cut if any(key in returned for key, _ in storages_of(env[node].meta["val"]))]
    copies = {value: _clone(graph, value) for value in held}  # what is returned is the caller's, who may write to it
    graph.output(tuple(seen_through(node, copies) for node in results))
    return _module(graph_module, graph)


def _copied(graph_module: fx.GraphModule, replaced: dict[fx.Node, str]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph without its output, some of its nodes replaced by inputs of those names."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    mode = fake_mode_of(graph_module.graph)
    nodes = list(graph_module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    for node in inputs:
        env[node] = graph.node_copy(node, env.__getitem__)
    for node, name in replaced.items():
        env[node] = graph.placeholder(name)
        value = node.meta["val"]
        with mode:
            empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        env[node].meta = {**node.meta, "val": empty}
    for node in nodes:
        if node not in env and node.op != "output":
            env[node] = graph.node_copy(node, env.__getitem__)
    return graph, env


def _results(graph: fx.Graph) -> Iterable[fx.Node]:
    results: tuple[fx.Node, ...] = graph.output_node().args[0]  # type: ignore[assignment]
    return results


def _module(source: fx.GraphModule, graph: fx.Graph, kept: Callable[[fx.Node], bool] = stays) -> fx.GraphModule:
    graph.eliminate_dead_code(kept)
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    made = fx.GraphModule({name: attrgetter(name)(source) for name in names}, graph, class_name="Split")
    share_weights(made, source.get_submodule(ROOT))
    propagate(made.graph)
    return made


def _check(graph_module: fx.GraphModule, skip: fx.GraphModule, cut: Sequence[fx.Node]) -> None:
    placeholders = [node for node in skip.graph.nodes if node.op == "placeholder"]
    for node, placeholder in zip(cut, placeholders[-len(cut) :], strict=True):
        if not placeholder.users:
            raise ValueError(
                f"the output does not depend on the cut at {node.name} of {module_path(node) or 'the model'}: "
                "cut at a value on the way to the output"
            )
    before, after = (sum(node.op == "call_function" for node in g.graph.nodes) for g in (graph_module, skip))
    if after >= before:
        raise ValueError(
            f"the cut at {', '.join(node.name for node in cut)} leaves nothing to skip: cut at a later value"
        )
