"""StreamedModule: stands where the user's module stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxstream.errors import GradientError
from fxstream.passes.capture import Inputs, owner

if TYPE_CHECKING:
    from fxstream.api import Compiled
    from fxstream.report import Plan

Compiler = Callable[[Sequence[Any], Mapping[str, Any]], "Compiled"]


class StreamedModule(nn.Module):
    """A module that runs the user's model by a plan, one for each kind of call.

    Parameters, buffers and submodules are the model's own (the same dictionaries), so ``state_dict()``, ``to()`` and
    their like act on the model; every other attribute is looked up there. A call whose shapes, strides, dtypes, devices
    or Python arguments were not seen before is planned, and the plan kept beside the others.
    """

    def __init__(self, model: Callable[..., Any], compiler: Compiler) -> None:
        super().__init__()
        module, _ = owner(model)
        self.__dict__["_original"] = module
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = getattr(module, name)
        self.training = module.training
        self._compiler = compiler
        self._compiled: dict[Any, Compiled] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def train(self, mode: bool = True) -> StreamedModule:
        self.__dict__["_original"].train(mode)
        self.training = mode
        return self

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans made so far, in the order of their first calls."""
        return tuple(compiled.plan for compiled in self._compiled.values())

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Capture and plan the call with these inputs, unless it was; runs nothing."""
        return self._compiled_for(Inputs.of(args, kwargs), args, kwargs).plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = Inputs.of(args, kwargs)
        if torch.is_grad_enabled():
            self._refuse_gradients(inputs)
        compiled = self._compiled_for(inputs, args, kwargs)
        with torch.no_grad():
            return compiled.captured.result(compiled.graph_module(*inputs.tensors))

    def _compiled_for(self, inputs: Inputs, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Compiled:
        key = (inputs.key(), self._state())
        if key not in self._compiled:
            self._compiled[key] = self._compiler(args, kwargs)
        return self._compiled[key]

    def _state(self) -> Any:
        """What of the model itself a plan depends on: its modules, whether they train, where its weights are."""
        modules = tuple((id(module), module.training) for module in self._original.modules())
        weight = next(self._original.parameters(), None)
        return modules, None if weight is None else (weight.dtype, weight.device)

    def _refuse_gradients(self, inputs: Inputs) -> None:
        if any(tensor.requires_grad for tensor in inputs.tensors):
            what = "an input requires a gradient"
        elif any(parameter.requires_grad for parameter in self._original.parameters()):
            what = "its parameters require gradients"
        else:
            return
        raise GradientError(
            f"a streamed {type(self._original).__name__} runs inference only, but autograd is on and {what}: call it "
            "under torch.no_grad() or torch.inference_mode(), or call requires_grad_(False) first"
        )
