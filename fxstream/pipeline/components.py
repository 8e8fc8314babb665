"""What a pipeline is made of, told by what its components offer: which are streamed, and what their weights weigh."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxstream.passes.graph.capture import owner
from fxstream.passes.graph.subclasses import weights_of

CODEC = ("encode", "decode")
"""Methods of a VAE that a pipeline calls instead of the module itself."""

TIME = re.compile(r"timestep\w*|\w+_time|ts?|r|sigmas?|noise_level")
"""Names of the argument that tells a denoiser how far its loop is, in the models of diffusers."""


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's modules by name, the user's own where one is streamed."""
    found = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: owner(module)[0] for name, module in found.items()}


def refuse_compiled(pipeline: Any) -> None:
    """Raise ``ValueError`` where a component is what ``torch.compile`` made of one: that would be no stage."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and "_orig_mod" in part._modules:
            kind = type(part._modules["_orig_mod"]).__name__
            raise ValueError(
                f"the pipeline's {name} is torch.compile({kind}), which can't be streamed: put the model itself there "
                f'(pipe.{name} = pipe.{name}._orig_mod), and ask optimize for compile="inductor", or compile the '
                "streamed one after"
            )


def streamed_methods(module: nn.Module) -> tuple[str, ...]:
    """The methods of a component that become stages: a codec's own, ``forward`` of what takes a time, or none."""
    if callable(getattr(module, "decode", None)):
        return tuple(name for name in CODEC if callable(getattr(module, name, None)))
    parameters = inspect.signature(module.forward).parameters
    return ("forward",) if any(map(TIME.fullmatch, parameters)) else ()


def stage_name(component: str, method: str) -> str:
    return component if method == "forward" else f"{component}.{method}"


def weight_bytes(
    modules: Mapping[str, nn.Module], counted: Callable[[torch.Tensor], bool] = lambda weight: True
) -> dict[str, int]:
    """Bytes of each component's weights, of those that are ``counted``.

    Weights that components share count for the first of them.
    """
    seen: set[int] = set()
    found = {name: sum(_new_bytes(filter(counted, weights_of(module)), seen)) for name, module in modules.items()}
    return {name: size for name, size in found.items() if size}


def _new_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> Iterator[int]:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage.nbytes()


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one: an index that isn't given is 0."""
    return one == other or (one.type == other.type and (one.index or 0) == (other.index or 0))
