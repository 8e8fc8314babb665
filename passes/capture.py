"""Capture: any callable module and its example inputs -> a functional ATen graph over flat tensors.

The graph's placeholders are the tensor leaves of (args, kwargs) and its outputs the tensor leaves of the result;
everything else (Python scalars, containers, output classes) is kept beside the graph. Weights are ``get_attr``
nodes that reach into the user's own module, so they are shared and a change to them is seen.
"""

from __future__ import annotations

import inspect
import linecache
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError

_MODULE_FILE = inspect.getfile(nn.Module)
ROOT = "model"
"""Name under which a captured graph holds the user's module."""


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
        leaves, spec = pytree.tree_flatten((tuple(args), {name: kwargs[name] for name in sorted(kwargs)}))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        rest = tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        return Inputs(tensors, rest, spec)

    def key(self) -> Any:
        """A value that is equal for calls that one plan serves.

        Raises ``ValueError`` for an argument that can't be compared.
        """
        tensors = tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in self.tensors)
        rest = tuple((type(leaf), leaf) for leaf in self.rest)
        try:
            hash(rest)
        except TypeError:
            kinds = sorted({type(leaf).__name__ for leaf in self.rest if type(leaf).__hash__ is None})
            raise ValueError(
                f"arguments of type {', '.join(kinds)} can't be told apart between calls: pass tensors, numbers, "
                "strings, or containers that torch.utils._pytree knows"
            ) from None
        return self.spec, rest, tensors

    def call(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with ``tensors`` in place of this call's own."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self.rest]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


class _TensorLeaf:
    def __repr__(self) -> str:
        return "<tensor>"


_TENSOR = _TensorLeaf()
"""Stands for a tensor among the other leaves."""


@dataclass
class Captured:
    """A captured call: ``graph_module(*tensors)`` gives the tensor leaves of the result.

    ``result`` puts the user's result together from them.
    """

    graph_module: fx.GraphModule
    inputs: Inputs
    rest: tuple[Any, ...]
    spec: pytree.TreeSpec

    def result(self, tensors: Sequence[torch.Tensor]) -> Any:
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if leaf is _TENSOR else leaf for leaf in self.rest], self.spec)


class _Flat(nn.Module):
    """The user's callable over flat tensors, as ``torch.export`` wants it."""

    def __init__(
        self, model: nn.Module, function: Callable[..., Any], inputs: Inputs, record: Callable[[Any], None]
    ) -> None:
        super().__init__()
        self.add_module(ROOT, model)
        self.function = (function,)  # in a tuple, lest a module be registered twice
        self.inputs = inputs
        self.record = record

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.inputs.call(tensors)
        leaves, spec = pytree.tree_flatten(self.function[0](*args, **kwargs))
        self.record((tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves), spec))
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def owner(target: Callable[..., Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """A module, or a bound method of one -> the module and what to call."""
    if isinstance(target, nn.Module):
        return target, target
    module = getattr(target, "__self__", None)
    if inspect.ismethod(target) and isinstance(module, nn.Module):
        return module, target
    raise TypeError(f"expected an nn.Module or a bound method of one, got {type(target).__name__}")


def capture(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Captured:
    """Capture one call of ``target`` by ``torch.export``; nothing is computed.

    Raises ``CaptureError`` with the user's module path and source line where the model can't be captured, and
    ``ValueError`` where the model refuses the inputs' number or names.
    """
    module, function = owner(target)
    keywords = dict(kwargs or {})
    try:
        inspect.signature(module.forward if function is module else function).bind(*args, **keywords)
    except TypeError as error:
        raise ValueError(f"{type(module).__name__} can't be called with these inputs: {error}") from None
    inputs = Inputs.of(args, keywords)
    results: list[tuple[tuple[Any, ...], pytree.TreeSpec]] = []
    flat = _Flat(module, function, inputs, results.append)
    flat.training = module.training
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(flat, _as_fake(inputs.tensors, module), strict=False)
            exported = exported.run_decompositions({})
    except Exception as error:
        raise _capture_error(module, error) from error
    return Captured(_graph_module(exported, module), inputs, *results[-1])


def _as_fake(tensors: Sequence[torch.Tensor], module: nn.Module) -> tuple[torch.Tensor, ...]:
    """Inputs in the fake mode of the module's weights, where it has one."""
    weights = [*module.parameters(), *module.buffers()]
    mode = next((weight.fake_mode for weight in weights if isinstance(weight, FakeTensor)), None)
    if mode is None:
        return tuple(tensors)
    return tuple(x if isinstance(x, FakeTensor) else mode.from_tensor(x) for x in tensors)


def _graph_module(exported: torch.export.ExportedProgram, module: nn.Module) -> fx.GraphModule:
    """The exported graph with its lifted weights as ``get_attr`` nodes into ``module``, mutations written back."""
    graph, env = fx.Graph(), {}
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
        if spec.kind is InputKind.CONSTANT_TENSOR:
            target = f"constant_{node.name}"
            root.register_buffer(target, exported.constants[str(spec.target)], persistent=False)
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            raise CaptureError(f"the captured graph has an input of kind {spec.kind.name}, which fxstream can't run")
        env[node] = graph.create_node("get_attr", target, name=node.name)
        env[node].meta = dict(node.meta)
    results = []
    for spec, value in zip(exported.graph_signature.output_specs, source.output_node().args[0], strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            results.append(env[value])
            continue
        name = next(name for name, given in specs.items() if name == spec.target or given.target == spec.target)
        written = next(env[node] for node in source.nodes if node.name == name)
        write = graph.call_function(torch.ops.aten.copy_.default, (written, env[value]))
        write.meta = {**env[value].meta, "val": written.meta["val"]}
    graph.output(tuple(results))
    root.add_module(ROOT, module)
    captured = fx.GraphModule(root, graph, class_name="Captured")
    share_weights(captured, module)
    return captured


def share_weights(graph_module: fx.GraphModule, module: nn.Module) -> None:
    """Let the ``get_attr`` nodes of ``graph_module`` reach into ``module`` itself (GraphModule copies attributes)."""
    graph_module.add_module(ROOT, module)


def module_path(node: fx.Node) -> str:
    """Path of the user's innermost submodule that made the node, "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix(ROOT).removeprefix(".")


def _capture_error(module: nn.Module, error: Exception) -> CaptureError:
    """Name the innermost of the user's submodules in the error's traceback, and the line that it was at."""
    if isinstance(error, CaptureError):
        return error
    names = {id(sub): name for name, sub in module.named_modules()}
    path, source = "", ""
    frame: TracebackType | None = error.__traceback__
    while frame is not None:
        this = frame.tb_frame.f_locals.get("self")
        if id(this) in names and frame.tb_frame.f_code.co_filename != _MODULE_FILE:
            path = names[id(this)]
            source = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
        frame = frame.tb_next
    line = linecache.getline(source.rpartition(":")[0], int(source.rpartition(":")[2])).strip() if source else ""
    where = f"in {path or type(module).__name__}" + (f" ({source})" if source else "")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    message = f"could not capture {type(module).__name__} as one graph: {where}\n"
    message += f"    {line}\n" if line else ""
    message += f"  {type(error).__name__}: {first}\n  {_advice(error)}"
    return CaptureError(message, module_path=path, source=source)


def _advice(error: Exception) -> str:
    name = type(error).__name__
    if "DataDependent" in name or "data-dependent" in str(error):
        return (
            "A Python branch or size there depends on a tensor's values. Pass that value as a Python number, "
            "or replace the branch by torch.where / torch.cond."
        )
    return (
        "Check that the model runs on these inputs by itself; then replace what torch.export can't trace there, "
        "or optimize the submodules around it one by one."
    )
