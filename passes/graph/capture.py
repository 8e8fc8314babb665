"""Capture: any callable module and its example inputs -> a functional ATen graph over flat tensors.

The graph's placeholders are the tensor leaves of (args, kwargs) and its outputs the tensor leaves of the result;
everything else (Python scalars, containers, output classes) is kept beside the graph. Weights are ``get_attr``
nodes that reach into the user's own module, so they are shared and a change to them is seen.
"""

from __future__ import annotations

import inspect
import linecache
import logging
import operator
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import get_ident
from types import FrameType, TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import Generator, fx, nn
from torch._inductor import config as inductor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.passes.graph.call import ROOT, Captured, Inputs, input_name
from fxstream.passes.graph.casts import casts_traced
from fxstream.passes.graph.collector import collector_paused
from fxstream.passes.graph.composites import open_composites, open_libraries, write_in_place
from fxstream.passes.graph.effects import memories, written_by
from fxstream.passes.graph.generators import DrawError, Generators, States, kept_generators, moves_watched
from fxstream.passes.graph.internal import internal_errors
from fxstream.passes.graph.known import KnownValues
from fxstream.passes.graph.numbers import Number, Numbers, is_leaf, leaf_place, number_places, told
from fxstream.passes.graph.parts import TARGET
from fxstream.passes.graph.places import Place, put, value_at
from fxstream.passes.graph.propagate import propagate_layouts
from fxstream.passes.graph.settle import settled
from fxstream.passes.graph.snapshot import Snapshot, global_hooks, roots_of
from fxstream.passes.graph.state import Assumed, Effect, State, assume, taken_apart
from fxstream.passes.graph.structure import TENSOR
from fxstream.passes.graph.subclasses import Dress, detach_wrapped, dressed, dresses, plain_tensors, weights_of
from fxstream.passes.graph.turns import tracing_apart, turn
from fxstream.passes.graph.twin import Twin
from fxstream.passes.graph.watching import forward_runs
from fxstream.runtime.draws import given_generator

_TORCH, _PASSES = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_PYTHON, _PACKAGES = str(Path(linecache.__file__).parent), f"{os.sep}site-packages{os.sep}"
_LOGS = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")]
_DATA: Any = vars(torch._C.TensorBase)["data"].__get__  # a new wrapper at each look, equal to the last


def roots_of_call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call can reach, by the names that places begin with."""
    module, function = owner(target)
    return {**roots_of(module), "call": function, "args": tuple(args), "kwargs": dict(kwargs)}


class _Flat(nn.Module):
    """The user's callable over flat tensors, as ``torch.export`` wants it.

    Those of the tensors that follow its own are put where they were ``assumed`` to be, before the call, and so are
    stand-ins for the ``numbers`` whose values there is a last tensor of.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        inputs: Inputs,
        known: KnownValues,
        generators: Generators,
        assumed: Sequence[Assumed],
        constants: Sequence[Place],
        dresses: Sequence[Dress],
        numbers: Numbers,
        record: Callable[[Any], None],
    ) -> None:
        super().__init__()
        module, function = owner(target)
        self.add_module(ROOT, module)
        self.target = (function,)  # in a tuple, lest a module be registered twice
        self.inputs = inputs
        self.known = known
        self.generators = generators
        self.assumed = assumed
        self.constants = constants
        self.dresses = dresses
        self.numbers = numbers
        self.record = record
        self.training = module.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with dressed(self.dresses):
            return self._forward(*tensors)

    def _forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        numbers = self.numbers.stand_ins(tensors[-1]) if self.numbers.places else {}
        leaves = [numbers.get(leaf_place(at), leaf) for at, leaf in enumerate(self.inputs.rest)]
        args, kwargs = replace(self.inputs, rest=tuple(leaves)).call(tensors)
        function = self.target[0]
        roots = roots_of_call(function, args, kwargs)
        held = {place: number for place, number in numbers.items() if not is_leaf(place)}
        before = Snapshot(roots, code=True)
        try:
            for place, number in held.items():
                put(place, roots, number)
            if self.assumed:
                assume(self.assumed, roots, tensors[self.inputs.count :])
            assumed = Snapshot(roots, code=True) if self.assumed or held else before
            self.known.follow([*tensors[: self.inputs.count], *(value_at(place, roots) for place in self.constants)])
            written = _assigned_buffers_written(function, before.weights)
            with self.generators, self.known, written, casts_traced(), forward_runs():
                result = function(*args, **kwargs)
            counted = self._counted(held, roots)
            changes = assumed.changes(Snapshot(roots, code=True))
            found, rest, spec = taken_apart(result, "what forward returns", before)
            effects = [Effect.of(change, before) for change in changes]
        except Exception as error:
            raise _ForwardError from error
        finally:
            before.rewind()
        self.record((tuple(map(told, rest)), spec, effects, [*counted]))
        set_ = tuple(tensor for effect in effects for tensor in effect.value.tensors)
        return found + set_ + tuple(number.in_graph() for number in counted.values())

    def _counted(self, held: Mapping[Place, Number], roots: Mapping[str, Any]) -> dict[Place, Number]:
        """The numbers that a forward has set where there were numbers; the old ones are put there again."""
        found = {}
        for place, number in held.items():
            now = value_at(place, roots)
            if type(now) is Number and now is not number:
                found[place] = now
                put(place, roots, number)
        return found


class _ForwardError(Exception):
    """The user's model raised, as the cause says. Without this torch.export prints the graph that it has so far."""


@contextmanager
def _assigned_buffers_written(function: Callable[..., Any], weights: Collection[int]) -> Iterator[None]:
    """Let ``self.buffer = value`` in a forward write into the buffer, which ``torch.export`` would forget.

    Of the model's own buffers, that is, by the ids of its ``weights``.
    """
    module, _ = owner(function)
    buffers = ((sub, name, buffer) for sub in module.modules() for name, buffer in sub._buffers.items())
    before = [(sub, name, buffer) for sub, name, buffer in buffers if id(buffer) in weights]
    yield
    for sub, name, buffer in before:
        assigned = sub._buffers.get(name)
        if assigned is buffer:
            continue
        if assigned is None or assigned.shape != buffer.shape or assigned.dtype != buffer.dtype:
            continue  # a change of state
        buffer.copy_(assigned)
        sub._buffers[name] = buffer


def owner(target: Callable[..., Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """A module, or a bound method of one -> the module and what to call. What is streamed already is as it was."""
    if isinstance(target, nn.Module):
        return owner(vars(target)[TARGET]) if TARGET in vars(target) else (target, target)
    module = getattr(target, "__self__", None)
    if inspect.ismethod(target) and isinstance(module, nn.Module):
        return module, target
    raise TypeError(f"expected an nn.Module or a bound method of one, got {type(target).__name__}")


def bind(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """A call's arguments by the parameters of the target's signature; ``ValueError`` where it refuses them."""
    module, function = owner(target)
    try:
        return inspect.signature(module.forward if function is module else function).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{type(module).__name__} can't be called with these inputs: {error}") from None


@turn()
@collector_paused()
def capture(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    live: Collection[Place] = (),
    lifting: bool = False,
) -> Captured:
    """Capture one call of ``target`` by ``torch.export``; nothing is computed.

    With ``lifting`` floats of the call and of the model's containers are values of the graph where they can be.

    Raises ``CaptureError`` with the user's module path and source line where the model can't be captured, and
    ``ValueError`` where the model refuses the inputs' number or names.
    """
    keywords = dict(kwargs or {})
    bind(target, args, keywords)
    roots = roots_of_call(target, args, keywords)
    places = number_places(Snapshot(roots, code=True)) if lifting else []
    places += map(leaf_place, Inputs.of(args, keywords).floats) if lifting else ()
    if places:
        with suppress(CaptureError):  # what it is refused for may be what stands in for a number
            return settled(lambda assumed: _undisturbed(target, args, keywords, assumed, places), roots, live)
    return settled(lambda assumed: _undisturbed(target, args, keywords, assumed, ()), roots, live)


def _undisturbed(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    assumed: Sequence[Assumed],
    places: Sequence[Place],
) -> Captured:
    """One capture of a call, in which no generator moves that is not torch's."""
    module, _ = owner(target)
    kept = kept_generators(module)
    states = States(kept)
    try:
        captured = _trace(target, args, kwargs, assumed, kept, places)
        if not states.moved():  # by the forward, or by another thread meanwhile
            return captured
        states.rewind()
        with moves_watched(states, _is_users) as found:
            captured = _trace(target, args, kwargs, assumed, kept, places)
        if not states.moved():
            return captured
        raise _draw_error(module, states.moved()[0], found)
    except BaseException:
        states.rewind()
        raise


def _trace(
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    assumed: Sequence[Assumed],
    kept: Sequence[Any],
    places: Sequence[Place],
) -> Captured:
    """One capture of a call, from a state in which what is assumed holds; ``kept`` may be drawn from.

    The floats at ``places`` are values.
    """
    module, function = owner(target)
    roots = roots_of_call(target, args, kwargs)
    places = [place for place in places if not _is_assumed([place], assumed)]
    held = [place for place in places if not is_leaf(place)]
    twin = Twin(module, apart={id(value_at(place[:-1], roots)) for place in held})
    detach_wrapped(twin.module)
    traced = twin.of(function)
    inputs = Inputs.of(args, kwargs)
    numbers = Numbers(
        places, [inputs.rest[place[1][1]] if is_leaf(place) else value_at(place, roots) for place in places]
    )
    results: list[tuple[tuple[Any, ...], pytree.TreeSpec, list[Effect], list[Place]]] = []
    before = Snapshot(roots, code=True)
    constants = {places[0]: tensor for tensor, places in before.constants().items() if not _is_assumed(places, assumed)}
    known = KnownValues(inputs.tensors, list(constants.values()))
    generators = Generators(inputs.generators, kept)
    drawing = inputs.drawing_from(generators.traced)
    worn = dresses(twin.module, twin.of)
    flat = _Flat(traced, drawing, known, generators, assumed, [*constants], worn, numbers, results.append)
    given = (*inputs.tensors, *_apart(inputs.tensors, [tensor for each in assumed for tensor in each.inputs]))
    given += (numbers.vector(),) if places else ()
    try:
        with (
            torch.no_grad(),
            _quiet(),
            _global_hooks_apart(traced),
            _attention_laid_out(),
            _DataSeen(),
            tracing_apart(),
        ):
            exported = torch.export.export(flat, _as_fake(given, module), strict=False)
            open_composites(exported.graph_module)
            with inductor.patch(fallback_random=True):  # draws that nothing reads are kept
                exported = exported.run_decompositions({})
            write_in_place(exported.graph_module)
            open_libraries(exported.graph_module)
    except _ForwardError as error:
        raise _capture_error(twin.module, error.__cause__ or error) from error.__cause__
    except Exception as error:
        raise _capture_error(twin.module, error) from error
    finally:
        before.rewind()
    _check_static(exported, module)
    with internal_errors("capture", exported.graph_module):
        graph_module = _graph_module(exported, module, generators)
        propagate_layouts(graph_module)
    rest, spec, effects, counted = results[-1]
    values = [node.meta["val"] for node in graph_module.graph.output_node().args[0]]
    numbered = enumerate(constants.items(), start=inputs.count)
    asked = tuple(place for index, (place, tensor) in numbered if index in known.read or _is_number(tensor))
    state = State.of(assumed, effects, values[sum(leaf is TENSOR for leaf in rest) :], asked)
    if places:
        values_of = () if _drop_unread(graph_module.graph) else tuple(places)
        taken, never = numbers.taken(), frozenset(numbers.told)
        state = replace(state, numbers=values_of, taken=taken, told=never, counted=tuple(counted))
    read = tuple(sorted(index for index in known.read if index < inputs.count))
    written_to = _written(graph_module.graph)
    captured = Captured(graph_module, inputs.without_tensors(), rest, spec, read, state, written_to, bool(worn))
    captured.refuse_aliases(inputs.tensors)
    return captured


def _drop_unread(graph: fx.Graph) -> bool:
    """Take the last input away, if nothing reads it."""
    last = graph.find_nodes(op="placeholder")[-1]
    unread = not last.users
    if unread:
        graph.erase_node(last)
        graph.owning_module.recompile()
    return unread


def _written(graph: fx.Graph) -> tuple[str, ...]:
    """Names of the inputs and weights that a captured graph writes to."""
    names = {node: input_name(index) for index, node in enumerate(graph.find_nodes(op="placeholder"))}
    names |= {node: str(node.target).removeprefix(f"{ROOT}.") for node in graph.find_nodes(op="get_attr")}
    return tuple(names[node] for write in graph.nodes for node in written_by(write) if node in names)


def _is_number(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be taken for a size unseen: Python asks those of one whole number for it in C."""
    return tensor.numel() == 1 and not tensor.is_floating_point() and not tensor.is_complex() and not tensor.is_meta


def _apart(inputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors like others, none of which shares its memory with an input or with one before it."""
    taken = {_memory(tensor) for tensor in inputs}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for tensor in others:
        memory = _memory(tensor)
        yield _in_mode(tensor, mode, anew=True) if memory in taken else tensor
        taken.add(memory)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_assumed(places: Sequence[Place], assumed: Sequence[Assumed]) -> bool:
    return any(place[: len(put)] == put for place in places for each in assumed for put in each.places)


@contextmanager
def _global_hooks_apart(target: Callable[..., Any]) -> Iterator[None]:
    """Let the hooks of all modules see the model's modules, and not itself: a streamed module's call has those."""
    hidden = owner(target)[1]

    def apart(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is hidden or isinstance(module, _Flat) or type(module).__module__.startswith(_EXPORT):
                return None
            return hook(module, *args, **kwargs)

        return call

    before = {name: dict(hooks) for name, hooks in global_hooks().items()}
    try:
        for hooks in global_hooks().values():
            hooks.update({handle: apart(hook) if callable(hook) else hook for handle, hook in hooks.items()})
        yield
    finally:
        for name, hooks in global_hooks().items():
            hooks.update(before[name])


_EXPORT = ("torch.export", "torch._export", "torch._functorch", "torch.fx")


@contextmanager
def _attention_laid_out() -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` know that it is traced: it lays its result out as its own kernel would, then.

    It asks first whether a tensor is of a class that answers for itself, and takes the modes of a trace for one.
    """
    asked, thread = torch.overrides.has_torch_function, get_ident()

    def answers(tensors: Any) -> bool:
        traced = get_ident() == thread and sys._getframe(1).f_code is nn.MultiheadAttention.forward.__code__
        return not traced and asked(tensors)

    with patch.object(torch.overrides, "has_torch_function", answers):
        yield


class _DataSeen(TorchFunctionMode):
    """Takes ``tensor.data`` for ``tensor.detach()``, so that what is written to it is written to the tensor.

    ``torch.export`` has no eye for the first: it takes it for a constant.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].detach() if function == _DATA else function(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own future, and its logs of an error that is raised anyway."""
    levels = [log.level for log in _LOGS]
    for log in _LOGS:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(_LOGS, levels, strict=True):
            log.setLevel(level)


def _as_fake(tensors: Sequence[torch.Tensor], module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Inputs in the fake mode of the module's weights, where it has one."""
    weights = [*weights_of(module), *tensors]
    mode = next((weight.fake_mode for weight in weights if isinstance(weight, FakeTensor)), None)
    if mode is not None and mode.shape_env is not None:  # that of a capture before this one
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    if mode is None:
        return _one_by_one(tensors, weights[: len(weights) - len(tensors)])
    return tuple(_in_mode(x, mode) for x in tensors)


def _one_by_one(tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors, fake ones of their layouts where some share memory: traced together they would be one."""
    memories = Counter(x.untyped_storage()._cdata for x in (*tensors, *weights))
    if all(memories[x.untyped_storage()._cdata] == 1 for x in tensors):
        return tuple(tensors)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors)


def _in_mode(tensor: torch.Tensor, mode: FakeTensorMode, anew: bool = False) -> torch.Tensor:
    if not isinstance(tensor, FakeTensor) and not anew:
        return mode.from_tensor(tensor)
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode:
        return tensor
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _graph_module(exported: torch.export.ExportedProgram, module: nn.Module, generators: Generators) -> fx.GraphModule:
    """The exported graph with its lifted weights as ``get_attr`` nodes into ``module``, mutations written back."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    root = nn.Module()
    root.add_module(ROOT, module)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    source = exported.graph_module.graph
    for node in source.nodes:
        if node.op == "output":
            continue
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind is InputKind.USER_INPUT:
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder":
                env[node].target = env[node].name
            continue
        target = str(spec.target)
        if isinstance(exported.constants.get(target), Generator):
            env[node] = _generator(graph, root, *generators.source(exported.constants[target]))
            continue
        if spec.kind is InputKind.CONSTANT_TENSOR:
            target = f"constant_{node.name}"
            root.register_buffer(target, exported.constants[str(spec.target)], persistent=False)
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            raise CaptureError(f"the captured graph has an input of kind {spec.kind.name}, which fxstream can't run")
        env[node] = graph.create_node("get_attr", _held_by(root, target), name=node.name)
        env[node].meta = dict(node.meta)
    inputs = {node.name: node for node in source.nodes if node.op == "placeholder"}
    results = []
    writes: dict[fx.Node, fx.Node] = {}
    for spec, value in zip(exported.graph_signature.output_specs, source.output_node().args[0], strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            results.append(seen_through(env[value], writes))  # what is returned of a written tensor is of it
            continue
        name = next(name for name, given in specs.items() if spec.target in (name, given.target))
        changed = env[inputs[name]]
        write = graph.call_function(torch.ops.aten.copy_.default, (changed, env[value]))
        write.meta = {**env[value].meta, "val": changed.meta["val"]}
        writes[env[value]] = write
    graph.output(tuple(results))
    captured = fx.GraphModule(root, graph, class_name="Captured")
    share_weights(captured, module)
    return captured


def _held_by(root: nn.Module, target: str) -> str:
    """Where a model has what ``torch.export`` calls an original of a parametrized weight.

    For a weight that holds others torch has a parametrization of its own, of what it holds, in order.
    """
    path, marked, original = target.partition(".parametrizations.")
    name, _, number = original.rpartition(".original")
    module = operator.attrgetter(path)(root) if marked else root
    if not marked or hasattr(module, "parametrizations"):
        return target
    held = list(plain_tensors(getattr(module, name)))
    return f"{path}.{name}{held[int(number)][0]}"


def seen_through(result: fx.Node, others: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A result that is one of some tensors, or a view of one, as that of the other tensor in its place."""
    if result in others:
        return others[result]
    memory = memories(result.meta["val"])
    if all(memory.isdisjoint(memories(value.meta["val"])) for value in others):
        return result
    inputs = {read: seen_through(read, others) for read in result.all_input_nodes}
    view = result.graph.node_copy(result, inputs.__getitem__)
    view.meta = dict(result.meta)
    return view


def _generator(graph: fx.Graph, root: nn.Module, place: int | None, generator: Generator) -> fx.Node:
    """A node for a generator that is drawn from: the call's own at that place, or one that is kept."""
    if place is not None:
        node = graph.call_function(given_generator, (place,))
        node.meta = {"val": Generator(generator.device)}
        return node
    name = f"generator_{sum(isinstance(each, Generator) for each in vars(root).values())}"
    setattr(root, name, generator)
    node = graph.create_node("get_attr", name)
    node.meta = {"val": generator}
    return node


def share_weights(graph_module: fx.GraphModule, module: nn.Module) -> None:
    """Let the ``get_attr`` nodes of ``graph_module`` reach into ``module`` itself (GraphModule copies attributes)."""
    graph_module.add_module(ROOT, module)


def rebuilt(
    source: fx.GraphModule, graph: fx.Graph, class_name: str, modules: Mapping[str, nn.Module] | None = None
) -> fx.GraphModule:
    """A graph module of another graph, over the attributes of ``source`` and further modules; weights are shared."""
    names = {str(node.target) for node in source.graph.nodes if node.op in ("get_attr", "call_module")}
    attributes = {name: operator.attrgetter(name)(source) for name in names}
    made = graph_module_of(graph, {**attributes, **(modules or {})}, class_name)
    root = getattr(source, ROOT, None)
    if root is not None:
        share_weights(made, root)
    return made


def graph_module_of(graph: fx.Graph, attributes: Mapping[str, Any], class_name: str) -> fx.GraphModule:
    """A graph module whose Python is written when it is first read or run: most that passes make never are."""
    return _LazyGraphModule(dict(attributes), graph, class_name=class_name)


def written(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph module with its Python, and that of the graphs in it, written: what several threads may call."""
    for module in graph_module.modules():
        if isinstance(module, _LazyGraphModule):
            module.real_recompile()
    return graph_module


def module_path(node: fx.Node) -> str:
    """Path of the user's innermost submodule that made the node, "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix(ROOT).removeprefix(".")


def _check_static(exported: torch.export.ExportedProgram, module: nn.Module) -> None:
    """Refuse a graph whose shapes or numbers depend on the values of tensors, or that holds graphs of its own."""
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
            if not isinstance(node.target, torch._ops.HigherOrderOperator):
                continue  # arithmetic on a symbolic size: what made the size is named instead
            what = f"{node.target} has graphs of its own"
            advice = f"Replace {node.target} there by operators on tensors, such as torch.where."
        elif node.target is torch.ops.aten.dequantize.self and not node.args[0].meta["val"].is_quantized:
            what = "dequantize is called on a tensor that is not quantized"
            advice = "While a model is traced, type(x) is torch.Tensor does not hold: ask isinstance there."
        elif _is_symbolic(node.meta.get("val")):
            what = f"the result of {node.target} has a value or a shape that depends on tensors' values"
            advice = _VALUES
        else:
            continue
        frames = [":".join(frame) for frame in FRAME.findall(node.meta.get("stack_trace") or "") if _is_users(frame[0])]
        raise _error(module, module_path(node), frames[-1] if frames else "", what, advice)


FRAME = re.compile(r'File "(.+?)", line (\d+)')
_VALUES = (
    "A Python number, branch or size there depends on a tensor's values. Pass that value as a Python number, "
    "or compute with the tensor itself, as by torch.where."
)
_OPERATORS = (
    "Check that the model runs on these inputs by itself; then replace what torch.export can't trace there, "
    "or optimize the submodules around it one by one."
)


def _is_users(file: str) -> bool:
    pythons = file.startswith(_PYTHON) and _PACKAGES not in file
    return not pythons and not file.startswith((_TORCH, _PASSES, "<eval", "<string", "<frozen"))


def _is_symbolic(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    sizes = [size for leaf in leaves if isinstance(leaf, torch.Tensor) for size in leaf.shape]
    return any(isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) for x in [*leaves, *sizes])


def _capture_error(module: nn.Module, error: BaseException) -> CaptureError:
    """Name the innermost of the user's submodules in the error's traceback, and the user's line that it was at."""
    if isinstance(error, CaptureError):
        return error
    names = {id(sub): name for name, sub in module.named_modules()}
    path, source, inside = "", "", False
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        code, scope = frame.tb_frame.f_code, frame.tb_frame.f_locals
        this = scope.get(code.co_varnames[0]) if code.co_argcount else None
        if id(this) in names and code.co_filename != __file__:
            path, inside = names[id(this)], True
        if inside and _is_users(code.co_filename):
            source = f"{code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    data_dependent = "DataDependent" in type(error).__name__ or "data-dependent" in str(error)
    advice = _VALUES if data_dependent else getattr(error, "advice", _OPERATORS)
    return _error(module, path, source, f"{type(error).__name__}: {first}", advice)


def _draw_error(module: nn.Module, generator: Any, found: Sequence[tuple[FrameType, int]]) -> CaptureError:
    """Name the line at which a generator was drawn from or seeded that no graph draws from."""
    names = {id(sub): name for name, sub in module.named_modules()}
    path = source = ""
    for frame, line in found:
        source = f"{frame.f_code.co_filename}:{line}"
        path = next((names[id(value)] for value in frame.f_locals.values() if id(value) in names), "")
    kind = f"{type(generator).__module__}.{type(generator).__qualname__}"
    return _error(module, path, source, f"forward draws from, or seeds, a {kind}", DrawError.advice)


def _error(module: nn.Module, path: str, source: str, what: str, advice: str) -> CaptureError:
    name = type(module).__name__
    file, _, number = source.rpartition(":")
    line = linecache.getline(file, int(number)).strip() if source else ""
    message = f"could not capture {name} as one graph: in {path or name}" + (f" ({source})" if source else "")
    message += f"\n    {line}" if line else ""
    values = advice is _VALUES
    return CaptureError(f"{message}\n  {what}\n  {advice}", module_path=path, source=source, data_dependent=values)
