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
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Generator, fx, nn
from torch._inductor import config as inductor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.passes.graph.aliases import overlaps, refuse_written
from fxstream.passes.graph.collector import collector_paused
from fxstream.passes.graph.composites import open_composites, write_in_place
from fxstream.passes.graph.effects import memories, written
from fxstream.passes.graph.generators import DrawError, Generators, States, kept_generators, moves_watched
from fxstream.passes.graph.internal import internal_errors
from fxstream.passes.graph.known import KnownValues
from fxstream.passes.graph.propagate import propagate_layouts
from fxstream.passes.graph.turns import tracing_apart, turn
from fxstream.passes.graph.twin import Twin
from fxstream.runtime.draws import given_generator

_TORCH, _PASSES = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_PYTHON, _PACKAGES = str(Path(linecache.__file__).parent), f"{os.sep}site-packages{os.sep}"
_LOGS = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")]
_DATA: Any = vars(torch._C.TensorBase)["data"].__get__  # a new wrapper at each look, equal to the last
ROOT = "model"
"""Name under which a captured graph holds the user's module."""

TARGET = "_streamed_target"
"""Name under which a streamed module holds what it was made of."""


@dataclass(frozen=True)
class Inputs:
    """One call's inputs: tensor leaves apart from the rest.

    ``spec`` and ``rest`` say how the call is put together again; together with the tensors' shapes, dtypes and
    devices they tell one plan from another.
    """

    tensors: tuple[torch.Tensor, ...]
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        inputs = Inputs(*flatten((tuple(args), {name: kwargs[name] for name in sorted(kwargs)})))
        for index, x in enumerate(inputs.tensors):
            if x.is_nested or x.layout is not torch.strided:
                kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
                raise CaptureError(f"input tensor {index} is {kind}, which fxstream can't plan for: pass a dense one")
            if x.is_conj() or x.is_neg():
                raise CaptureError(
                    f"input tensor {index} is a view of conjugates or negatives, which fxstream can't plan for: "
                    "pass x.resolve_conj().resolve_neg()"
                )
        return inputs

    def without_tensors(self) -> Inputs:
        """How the call is put together, alone: nothing here keeps an example's tensors alive."""
        return Inputs((), tuple(_GENERATOR if isinstance(leaf, Generator) else leaf for leaf in self.rest), self.spec)

    @property
    def generators(self) -> tuple[Generator, ...]:
        """The leaves that are generators of random numbers: a plan serves all of a device."""
        return tuple(leaf for leaf in self.rest if isinstance(leaf, Generator))

    def key(self) -> Any:
        """A value that is equal for calls that one plan serves.

        Raises ``ValueError`` for an argument that can't be compared.
        """
        tensors = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in self.tensors)
        rest = tuple((type(leaf), self._told(leaf)) for leaf in self.rest)
        try:
            hash((self.spec, rest))
        except TypeError:
            kinds = sorted({type(leaf).__name__ for leaf in self.rest if type(leaf).__hash__ is None})
            raise ValueError(
                f"arguments of type {', '.join(kinds)} can't be told apart between calls: pass tensors, numbers, "
                "strings, or containers that torch.utils._pytree knows"
            ) from None
        return self.spec, rest, (tensors, overlaps(self.tensors))

    def _told(self, leaf: Any) -> Any:
        """What tells a leaf apart: of a generator its device, and the first leaf that is the same one."""
        if isinstance(leaf, Generator):
            return leaf.device, next(at for at, other in enumerate(self.generators) if other is leaf)
        return leaf.hex() if isinstance(leaf, float) else leaf

    def drawing_from(self, generators: Sequence[Generator]) -> Inputs:
        """The same call with other generators."""
        others = iter(generators)
        return replace(self, rest=tuple(next(others) if isinstance(x, Generator) else x for x in self.rest))

    def values(self, positions: Iterable[int]) -> tuple[bytes, ...]:
        """What the tensors at these positions hold."""
        tensors = (self.tensors[index].detach().cpu().contiguous() for index in sorted(positions))
        return tuple(tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)

    def call(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with ``tensors`` in place of this call's own."""
        args, kwargs = unflatten(tensors, self.rest, self.spec)
        return args, kwargs


class _TensorLeaf:
    def __repr__(self) -> str:
        return "<tensor>"


_TENSOR = _TensorLeaf()
"""Stands for a tensor among the other leaves."""

_GENERATOR = object()
"""Stands for a generator, which no plan keeps."""


def flatten(value: Any) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...], pytree.TreeSpec]:
    """Any nest of containers and objects -> its tensors, its other leaves (``_TENSOR`` for a tensor), its structure."""
    leaves, spec = pytree.tree_flatten(value)
    if any(_holds_tensors(leaf) for leaf in leaves):
        leaves, spec = pytree.tree_flatten(pytree.tree_unflatten([_opened(leaf) for leaf in leaves], spec))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    return tensors, tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), spec


def unflatten(tensors: Sequence[torch.Tensor], rest: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The inverse of ``flatten``."""
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if leaf is _TENSOR else leaf for leaf in rest], spec)


@dataclass(frozen=True)
class _Opened:
    """The attributes of an object of ``kind``: a dataclass, or another class that pytree doesn't know, with tensors."""

    kind: type
    attributes: dict[str, Any]


def _holds_tensors(leaf: Any) -> bool:
    """Whether a leaf of pytree's is an object with tensors in its attributes."""
    if isinstance(leaf, (torch.Tensor, nn.Module, type, str, int, float, _TensorLeaf)) or leaf is None:
        return False
    found = pytree.tree_leaves(list(_attributes(leaf).values()))
    return any(isinstance(x, torch.Tensor) or (is_dataclass(leaf) and _holds_tensors(x)) for x in found)


def _attributes(leaf: Any) -> dict[str, Any]:
    if is_dataclass(leaf):
        return {field.name: getattr(leaf, field.name) for field in fields(leaf)} | getattr(leaf, "__dict__", {})
    return getattr(leaf, "__dict__", {})


def _opened(leaf: Any) -> Any:
    if not _holds_tensors(leaf):
        return leaf
    return _Opened(type(leaf), pytree.tree_map(_opened, _attributes(leaf)))


def _closed(values: Iterable[Any], context: tuple[type, tuple[str, ...]]) -> Any:
    kind, names = context
    made: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(
    _Opened, lambda opened: (list(opened.attributes.values()), (opened.kind, tuple(opened.attributes))), _closed
)


@dataclass
class Captured:
    """A captured call: ``graph_module(*tensors)`` gives the tensor leaves of the result.

    ``result`` puts the user's result together from them. It is right for inputs alone whose tensors at the positions
    ``read`` have the values that they had, and where what is ``written`` to shares no memory with another.
    """

    graph_module: fx.GraphModule
    inputs: Inputs
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec
    read: tuple[int, ...] = ()
    written: tuple[str, ...] = ()

    def refuse_aliases(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise ``CaptureError`` where an input or a weight that the call writes to lies over another of these."""
        if self.written:
            weights = [str(node.target) for node in self.graph_module.graph.find_nodes(op="get_attr")]
            values = {name: operator.attrgetter(name)(self.graph_module) for name in weights}
            named = {name.removeprefix(f"{ROOT}."): x for name, x in values.items() if isinstance(x, torch.Tensor)}
            named |= {_input_name(index): tensor for index, tensor in enumerate(tensors)}
            refuse_written(named, self.written, type(getattr(self.graph_module, ROOT)).__name__)

    def result(self, tensors: Sequence[torch.Tensor]) -> Any:
        return unflatten(tensors, self.rest, self.spec)


class _Flat(nn.Module):
    """The user's callable over flat tensors, as ``torch.export`` wants it."""

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        inputs: Inputs,
        known: KnownValues,
        generators: Generators,
        record: Callable[[Any], None],
    ) -> None:
        super().__init__()
        self.add_module(ROOT, model)
        self.function = (function,)  # in a tuple, lest a module be registered twice
        self.inputs = inputs
        self.known = known
        self.generators = generators
        self.record = record
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.inputs.call(tensors)
        self.known.follow(tensors)
        try:
            with self.generators, self.known, _assigned_buffers_written(self.function[0]):
                found, rest, spec = flatten(self.function[0](*args, **kwargs))
        except Exception as error:
            raise _ForwardError from error
        self.record((rest, spec))
        return found


class _ForwardError(Exception):
    """The user's model raised, as the cause says. Without this torch.export prints the graph that it has so far."""


@contextmanager
def _assigned_buffers_written(function: Callable[..., Any]) -> Iterator[None]:
    """Let ``self.buffer = value`` in a forward write into the buffer, which ``torch.export`` would forget."""
    module, _ = owner(function)
    before = [(sub, name, buffer) for sub in module.modules() for name, buffer in sub._buffers.items()]
    yield
    for sub, name, buffer in before:
        assigned = sub._buffers.get(name)
        if assigned is buffer:
            continue
        if buffer is None or assigned is None or assigned.shape != buffer.shape or assigned.dtype != buffer.dtype:
            raise RuntimeError(f"forward replaces the buffer {name!r} of {type(sub).__name__} by one of another kind")
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
def capture(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Captured:
    """Capture one call of ``target`` by ``torch.export``; nothing is computed.

    Raises ``CaptureError`` with the user's module path and source line where the model can't be captured, and
    ``ValueError`` where the model refuses the inputs' number or names.
    """
    module, function = owner(target)
    keywords = dict(kwargs or {})
    bind(target, args, keywords)
    inputs = Inputs.of(args, keywords)
    return _undisturbed(module, function, inputs)


def _undisturbed(module: nn.Module, function: Callable[..., Any], inputs: Inputs) -> Captured:
    """A capture in which no generator moves that is not torch's."""
    kept = kept_generators(module)
    states = States(kept)
    try:
        captured = _capture(module, function, inputs, kept)
        if not states.moved():  # by the forward, or by another thread meanwhile
            return captured
        states.rewind()
        with moves_watched(states, _is_users) as found:
            captured = _capture(module, function, inputs, kept)
        if not states.moved():
            return captured
        raise _draw_error(module, states.moved()[0], found)
    except BaseException:
        states.rewind()
        raise


def _capture(module: nn.Module, function: Callable[..., Any], inputs: Inputs, kept: Sequence[Any]) -> Captured:
    """``capture``, with the generators that may be drawn from beside those of the call."""
    results: list[tuple[tuple[Any, ...], pytree.TreeSpec]] = []
    known = KnownValues(inputs.tensors)
    generators = Generators(inputs.generators, kept)
    twin = Twin(module)
    traced = inputs.drawing_from(generators.traced)
    flat = _Flat(twin.module, twin.of(function), traced, known, generators, results.append)
    try:
        with torch.no_grad(), _quiet(), _attributes_kept(module), _DataSeen(), tracing_apart():
            exported = torch.export.export(flat, _as_fake(inputs.tensors, module), strict=False)
            open_composites(exported.graph_module)
            with inductor.patch(fallback_random=True):  # draws that nothing reads are kept
                exported = exported.run_decompositions({})
            write_in_place(exported.graph_module)
    except _ForwardError as error:
        raise _capture_error(twin.module, error.__cause__ or error) from error.__cause__
    except Exception as error:
        raise _capture_error(twin.module, error) from error
    _check_static(exported, module)
    with internal_errors("capture", exported.graph_module):
        graph_module = _graph_module(exported, module, generators)
        propagate_layouts(graph_module)
    read, changed = tuple(sorted(known.read)), _written(graph_module.graph)
    captured = Captured(graph_module, inputs.without_tensors(), *results[-1], read=read, written=changed)
    captured.refuse_aliases(inputs.tensors)
    return captured


def _written(graph: fx.Graph) -> tuple[str, ...]:
    """Names of the inputs and weights that a captured graph writes to."""
    names = {node: _input_name(index) for index, node in enumerate(graph.find_nodes(op="placeholder"))}
    names |= {node: str(node.target).removeprefix(f"{ROOT}.") for node in graph.find_nodes(op="get_attr")}
    return tuple(names[node] for write in graph.nodes for node in written(write) if node in names)


def _input_name(index: int) -> str:
    return f"input tensor {index}"


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


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a forward does to the attributes of modules, containers among them all the way down."""
    rewinds = [_rewind(vars(sub)) for sub in module.modules()]
    try:
        yield
    finally:
        for rewind in rewinds:
            rewind()


def _rewind(container: Any) -> Callable[[], None]:
    """A function that gives a dict or list, and those within it, their present content back."""
    content = container.copy()
    values = content.values() if isinstance(content, dict) else content
    inner = [_rewind(value) for value in values if type(value) in (dict, OrderedDict, list)]

    def rewind() -> None:
        container.clear()
        container.update(content) if isinstance(content, dict) else container.extend(content)
        for within in inner:
            within()

    return rewind


def _as_fake(tensors: Sequence[torch.Tensor], module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Inputs in the fake mode of the module's weights, where it has one, and apart from each other and the weights."""
    weights = [*module.parameters(), *module.buffers()]
    mode = next((weight.fake_mode for weight in weights if isinstance(weight, FakeTensor)), None)
    if mode is None:
        return _apart(tensors, weights)
    return tuple(x if isinstance(x, FakeTensor) else mode.from_tensor(x) for x in tensors)


def _apart(tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The tensors, fake ones of their layouts where some share memory: traced together they would be one."""
    memories = Counter(x.untyped_storage()._cdata for x in (*tensors, *weights))
    if all(memories[x.untyped_storage()._cdata] == 1 for x in tensors):
        return tuple(tensors)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in tensors)


def _graph_module(exported: torch.export.ExportedProgram, module: nn.Module, generators: Generators) -> fx.GraphModule:
    """The exported graph with its lifted weights as ``get_attr`` nodes into ``module``, mutations written back."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    root = nn.Module()
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
        env[node] = graph.create_node("get_attr", target, name=node.name)
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
    root.add_module(ROOT, module)
    captured = fx.GraphModule(root, graph, class_name="Captured")
    share_weights(captured, module)
    return captured


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
    made = fx.GraphModule({**attributes, **(modules or {})}, graph, class_name=class_name)
    root = getattr(source, ROOT, None)
    if root is not None:
        share_weights(made, root)
    return made


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
    return CaptureError(f"{message}\n  {what}\n  {advice}", module_path=path, source=source)
