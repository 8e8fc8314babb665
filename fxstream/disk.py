"""Weights at home on disk: what ``offload`` may say, and how weights get there."""

from __future__ import annotations

import operator
import os
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.passes.graph.call import ROOT
from fxstream.runtime.files import OpenFile, locate, region_of
from fxstream.runtime.spill import spill


@dataclass(frozen=True)
class Disk:
    """Weights that are mapped from a file stay in it; the others go to one in ``folder``, or where temporary ones are.

    Only those go that the plan fetches.
    """

    folder: str | None = None

    @staticmethod
    def parse(offload: object) -> Disk | None:
        """None, ``"disk"`` or ``"disk:FOLDER"``; raises ``ValueError`` for anything else."""
        if offload is None:
            return None
        kind, colon, folder = offload.partition(":") if isinstance(offload, str) else ("", "", "")
        if kind == "host":
            raise ValueError(
                'offload="host" is not there yet: weights are streamed on the CPU alone so far, where the device is '
                'the host. Use offload="disk"'
            )
        if kind != "disk" or (colon and not folder):
            raise ValueError(f'offload {offload!r} can\'t be read: use None, "disk" or "disk:FOLDER"')
        if platform.system() != "Linux":
            raise ValueError(f"offload={offload!r}: which file memory is mapped from is known on Linux alone so far")
        if folder and not Path(folder).is_dir():
            raise ValueError(f"offload {offload!r}: there is no folder {folder}")
        return Disk(folder or None)

    def take(self, graph_module: fx.GraphModule, names: Collection[str], model: nn.Module) -> None:
        """Send home the weights of a model that a planned graph fetches, by their names, and that are not there yet.

        Raises ``OSError`` where the file can't be written; the model is as it was then.
        """
        weights = [weight for name, weight in _weights(graph_module).items() if name in names]
        locate(weights)
        storages = {_storage(weight) for weight in weights if region_of(weight) is None}
        spill([tensor for tensor in _tensors(model) if _storage(tensor) in storages], self.folder)


def checked(graph_module: fx.GraphModule, run: Callable[..., Any]) -> Callable[..., Any]:
    """What runs a graph, after a look whether the files of its weights are as long as they were.

    Memory that is mapped from a part that a file has lost can't be read: the system ends the process.
    """
    sizes: dict[OpenFile, int] = {}
    for weight in _weights(graph_module).values():
        region = region_of(weight)
        if region is not None:
            end = region.offset_of(weight.data_ptr()) + weight.numel() * weight.element_size()
            sizes[region.file] = max(end, sizes.get(region.file, 0))

    def checked_run(*tensors: torch.Tensor) -> Any:
        for file, size in sizes.items():
            found = os.fstat(file.descriptor).st_size
            if found < size:
                raise OSError(
                    f"{file.path} has {found} bytes, and its weights took {size}: it was shortened while in use. Load "
                    "the model again"
                )
        return run(*tensors)

    return checked_run


def kept_weights(graph_module: fx.GraphModule) -> set[str]:
    """Names of a captured graph's weights that can't be moved to disk: what else lies in their memory is not known.

    That is where something beside the model's parameters and buffers holds on to it, such as an attribute that is a
    view of a weight.
    """
    real = _weights(graph_module)
    locate(real.values())
    known = Counter(map(_storage, _tensors(getattr(graph_module, ROOT))))
    kept = set()
    for name, weight in real.items():
        storage = weight.untyped_storage()  # which holds on to it once more
        if region_of(weight) is None and torch._C._storage_Use_Count(storage._cdata) > known[storage._cdata] + 1:
            kept.add(name)
    return kept


def _weights(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The weights of a graph that have memory, by their names."""
    names = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    found = {name: operator.attrgetter(name)(graph_module) for name in names}
    return {
        name: weight
        for name, weight in found.items()
        if isinstance(weight, torch.Tensor) and not isinstance(weight, FakeTensor) and not weight.is_meta
    }


def refuse_elsewhere(tensors: Iterable[torch.Tensor]) -> None:
    """Raise ``ValueError`` where weights are on another device than the CPU."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(
                f'offload="disk" fetches weights to the CPU alone so far, and this model has some on {tensor.device}'
            )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a model, each once."""
    found: dict[int, Any] = {id(tensor): tensor for tensor in model.parameters()}
    found |= {id(tensor): tensor for tensor in model.buffers()}
    return list(found.values())
