"""Settle: a capture that is right in the states that its calls leave, one after another.

A call that changes something beside its result is traced once more, from the state that it leaves. Where that is as
one before, or gives the same graph, the changes can be written back after every call. Where each call leaves another
state, and the graph shows or the forward is seen to read it, the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.passes.graph.call import Captured
from fxstream.passes.graph.known import WRITTEN
from fxstream.passes.graph.parts import ABSENT
from fxstream.passes.graph.places import Place, describe, owner_of, value_at
from fxstream.passes.graph.snapshot import Snapshot
from fxstream.passes.graph.state import Assumed, Effect, layout_of
from fxstream.passes.graph.structure import Flattened, Made, flatten, unflatten
from fxstream.passes.graph.watching import watching

MOST_TRACED = 4
"""Captures of one call in the states that it leaves one after another, until they settle."""


def settled(
    trace: Callable[[Sequence[Assumed]], Captured], roots: Mapping[str, Any], live: Collection[Place] = ()
) -> Captured:
    """A captured call that is right for this state of the model, and after it for the next one.

    ``trace`` captures the call where something is assumed of the state; tensors at ``live`` places are inputs.
    Raises ``CaptureError`` where each call leaves another state, and what is computed depends on it.
    """
    present = _present([(place,) for place in live], roots)
    try:
        first = trace(present)
    except CaptureError as error:
        if WRITTEN not in str(error):
            raise
        present = _present(map(tuple, Snapshot(roots, code=True).constants().values()), roots)
        first = trace(present)
    replaced = [(effect.place,) for effect in _kept(first) if effect.replaces and not effect.more]
    missing = [places for places in replaced if places[0] not in _places(present)]
    if missing:
        present = [*present, *_present(missing, roots)]
        first = trace(present)
    if _is_as_before(first, roots):
        return _with_live(first, first)
    chain, states, settling = [first], [present], True
    seen = {effect.place: [layout_of(value_at(effect.place, roots)), effect.layout] for effect in _kept(first)}
    moving: dict[Place, tuple[Effect, Effect]] = {}
    while settling and len(chain) < MOST_TRACED:
        states.append(_merged(states[-1], _after(chain[-1], states[-1])))
        chain.append(trace(states[-1]))
        settling = False
        for effect in _kept(chain[-1]):
            known = seen.setdefault(effect.place, [])
            if effect.more or (known and effect.layout not in known):
                before = next(e for each in chain for e in _kept(each) if e.place == effect.place)
                moving.setdefault(effect.place, (before, effect))
            settling |= not known
            known.append(effect.layout)
    second = chain[1]
    if moving:
        _check_unread(trace, first, second, states, moving, roots)
    told, agreeing = _told(_kept(first)), _told(_kept(second))
    lost = {effect.place for key, effect in told.items() if effect.place in moving and key not in agreeing}
    once = [effect for key, effect in told.items() if key not in agreeing and effect.place not in lost]
    more = [effect for key, effect in agreeing.items() if key not in told and effect.place not in moving]
    again = (
        not more
        and all(map(_is_the_same_twice, once))
        and same_graph(first.graph_module, second.graph_module)
        and _same_results(first, second)
    )
    found = _with_live(_unread(first, frozenset(moving), lost), second)
    return replace(found, state=replace(found.state, again=again))


def _kept(captured: Captured) -> list[Effect]:
    """The effects on what is there at the next call; a call's arguments are its own."""
    return [effect for effect in captured.state.effects if effect.place[0][1] not in ("args", "kwargs")]


def _told(effects: Iterable[Effect]) -> dict[Any, Effect]:
    """Effects by what they set, and where."""
    return {(effect.place, effect.more, effect.layout): effect for effect in effects}


def _is_the_same_twice(effect: Effect) -> bool:
    """Whether to set this again changes nothing, as a call finds it that leaves it alone."""
    absent = any(leaf is ABSENT for leaf in effect.value.rest)
    return not (effect.more or effect.value.tensors or absent)


def _same_results(one: Captured, other: Captured) -> bool:
    """Whether two captures of a call give the caller the same, apart from what is in tensors."""
    return _given(one) == _given(other)


def _given(captured: Captured) -> Any:
    """What a call returns, and leaves in its arguments, without tensors."""
    arguments = [effect for effect in captured.state.effects if effect.place[0][1] in ("args", "kwargs")]
    rest = [leaf.value if isinstance(leaf, Made) else leaf for leaf in captured.rest]
    return captured.spec, layout_of(rest), {*_told(arguments)}


def _merged(present: Sequence[Assumed], then: Sequence[Assumed]) -> list[Assumed]:
    """What is assumed after a change of it."""
    changed = _places(each for each in then if not each.more)
    return [*(each for each in present if not changed.intersection(each.places)), *then]


def _with_live(captured: Captured, then: Captured) -> Captured:
    """A capture whose live places are those of tensors that the call sets ``then``, in the state that it leaves."""
    set_again = {effect.place for effect in then.state.effects if effect.value.tensors and not effect.more}
    live = (set_again - captured.state.unread) | {*captured.state.inputs}
    return replace(captured, state=replace(captured.state, live=frozenset(live)))


def _present(places: Iterable[tuple[Place, ...]], roots: Mapping[str, Any]) -> list[Assumed]:
    """What is there now, as the inputs of a trace: of places that one tensor is at, the first tells."""
    found = [(each, value_at(each[0], roots)) for each in places]
    return [Assumed(each, False, flatten(value)) for each, value in found if value is not ABSENT]


def _places(assumed: Iterable[Assumed]) -> set[Place]:
    return {place for each in assumed for place in each.places}


def _after(first: Captured, present: Sequence[Assumed], but: Collection[Place] = ()) -> list[Assumed]:
    """What a call leaves, as the inputs of another trace; what needs no input is computed, lest it is read."""
    outputs = iter(_outputs(first.graph_module)[_results(first) :])
    found = []
    for effect in first.state.effects:
        nodes = [next(outputs) for _ in effect.value.tensors]
        made = _made_alone(first.graph_module, nodes) if nodes else None
        if effect.place in but or effect.place[0][1] in ("args", "kwargs"):
            continue
        if made is None:
            found.append(Assumed((effect.place,), effect.more, effect.value))
        else:
            value = flatten(unflatten(made, effect.value.rest, effect.value.spec))
            found.append(Assumed((effect.place,), effect.more, value, fixed=True))
    return found


def _results(captured: Captured) -> int:
    """How many outputs of the graph are the call's own."""
    return len(_outputs(captured.graph_module)) - captured.state.count


def _made_alone(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[torch.Tensor] | None:
    """The values of nodes that depend on no input and on no draw; None of others."""
    needed: dict[fx.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        drawn = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if node.op == "placeholder" or drawn:
            return None
        if node not in needed:
            needed[node] = None
            waiting.extend(node.all_input_nodes)
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph_module.graph.nodes:
        if node in needed:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output([env[node] for node in nodes])
    with torch.no_grad():
        made = fx.Interpreter(fx.GraphModule(graph_module, graph)).run()
    return None if any(isinstance(tensor, FakeTensor) for tensor in made) else made


def _check_unread(
    trace: Callable[[Sequence[Assumed]], Captured],
    first: Captured,
    second: Captured,
    states: Sequence[Sequence[Assumed]],
    moving: Mapping[Place, tuple[Effect, Effect]],
    roots: Mapping[str, Any],
) -> None:
    """Refuse a call that leaves another state each time, unless it computes the same without that."""
    still = _merged(states[0], _after(first, states[0], moving))
    watched, read = _watched(moving, roots)
    without = trace([*still, *watched])
    ends = _outputs_but(without, moving), _outputs_but(second, moving)
    unread = _same(without.graph_module, ends[0], second.graph_module, ends[1])
    if read or not unread or not _same_results(first, second):
        raise _refusal(next(iter(moving.values())), roots)


def _watched(
    moving: Mapping[Place, tuple[Effect, Effect]], roots: Mapping[str, Any]
) -> tuple[list[Assumed], list[str]]:
    """The values at places that move, telling when they are read, and the list of what they told."""
    read: list[str] = []
    watched = []
    for place in moving:
        whole = place[:-1] if place[-1][0] == "content" else place
        value = watching(value_at(whole, roots), read.append)
        if value is not None:
            watched.append(Assumed((whole,), False, Flattened((), (value,), _LEAF)))
    return watched, read


_LEAF = pytree.tree_flatten(0)[1]


def _is_as_before(captured: Captured, roots: Mapping[str, Any]) -> bool:
    """Whether a call leaves a state like the one that it found."""
    effects = _kept(captured)
    return all(not each.more and each.layout == layout_of(value_at(each.place, roots)) for each in effects)


def _unread(captured: Captured, places: Collection[Place], lost: Collection[Place]) -> Captured:
    """A capture whose result is known not to depend on some places; the effects at those ``lost`` are left out."""
    kept = _outputs_but(captured, lost)
    captured.graph_module.graph.output_node().args = (tuple(kept),)
    captured.graph_module.recompile()
    effects = [effect for effect in captured.state.effects if effect.place not in lost]
    return replace(captured, state=replace(captured.state, effects=tuple(effects), unread=frozenset(places)))


def same_graph(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two captured graphs compute the same; inputs that are not read don't count."""
    return _same(one, _outputs(one), other, _outputs(other))


def same_call(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two captured graphs take the same inputs, compute the same, and give and write the same."""
    inputs, others = (graph_module.graph.find_nodes(op="placeholder") for graph_module in (one, other))
    return [*map(_layouts, inputs)] == [*map(_layouts, others)] and same_graph(one, other)


def _outputs(graph_module: fx.GraphModule) -> list[fx.Node]:
    results: Any = graph_module.graph.output_node().args[0]
    return list(results)


def _outputs_but(captured: Captured, places: Collection[Place]) -> list[fx.Node]:
    """The outputs of a captured graph but those that are set at some places."""
    outputs = _outputs(captured.graph_module)
    kept, given = outputs[: _results(captured)], iter(outputs[_results(captured) :])
    for effect in captured.state.effects:
        nodes = [next(given) for _ in effect.value.tensors]
        kept += [] if effect.place in places else nodes
    return [*kept, *given]


def _same(one: fx.GraphModule, ones: list[fx.Node], other: fx.GraphModule, others: list[fx.Node]) -> bool:
    """Whether two graphs compute the same at these nodes, and write the same."""
    left, right = _needed(one, ones), _needed(other, others)
    numbers = [{node: index for index, node in enumerate(nodes)} for nodes in (left, right)]
    ends = [[numbers[side][node] for node in nodes] for side, nodes in enumerate((ones, others))]
    return (
        len(left) == len(right)
        and ends[0] == ends[1]
        and all(
            a.op == b.op
            and (_same_constant(one, a, other, b) if a.op == "get_attr" else a.target == b.target)
            and _numbered(a, numbers[0]) == _numbered(b, numbers[1])
            and _layouts(a) == _layouts(b)
            for a, b in zip(left, right, strict=True)
        )
    )


def _needed(graph_module: fx.GraphModule, outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that some outputs and all writes are made of, in their order."""
    nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
    needed: set[fx.Node] = {*outputs, *(node for node in nodes if node.op == "call_function" and not node.users)}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in nodes if node in needed]


def _layouts(node: fx.Node) -> list[Any]:
    values = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]
    return [(value.shape, value.stride(), value.dtype, value.device, value.requires_grad) for value in values]


def _numbered(node: fx.Node, numbers: Mapping[fx.Node, int]) -> Any:
    """A node's arguments, by the numbers of nodes, and other values with their types."""
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)), is_leaf=lambda x: isinstance(x, fx.Node))
    return spec, [("node", numbers[x]) if isinstance(x, fx.Node) else (type(x), repr(x)) for x in leaves]


def _same_constant(one: fx.GraphModule, a: fx.Node, other: fx.GraphModule, b: fx.Node) -> bool:
    left, right = attrgetter(str(a.target))(one), attrgetter(str(b.target))(other)
    if left is right:
        return True
    if isinstance(left, FakeTensor) or isinstance(right, FakeTensor) or left.is_meta or right.is_meta:
        return False
    alike = (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
    return alike and (left.data_ptr() == right.data_ptr() or torch.equal(left, right))


def _refusal(moving: tuple[Effect, Effect], roots: Mapping[str, Any]) -> CaptureError:
    first, second = moving
    where = describe(first.place)
    path, module = owner_of(first.place, roots)
    model = type(roots["model"]).__name__
    return CaptureError(
        f"could not capture {model} as one graph: forward changes {where} of {path or model} "
        f"({type(module).__name__}) from {first.shown[0]} to {first.shown[1]}, in the next call to {second.shown[1]}, "
        "and what it computes depends on it\n  Pass it as an argument, as a tensor or a number, or keep it in a buffer "
        "that forward writes to",
        module_path=path,
    )
