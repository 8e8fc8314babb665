"""Weights at home on disk: what ``offload`` may say, and how weights get there."""

from __future__ import annotations

import operator
import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.passes.graph.call import ROOT
from fxstream.passes.graph.subclasses import weights_of
from fxstream.runtime.files import OpenFile, locate, region_of
from fxstream.runtime.release import release
from fxstream.runtime.spill import files_reused, spill


@dataclass(frozen=True)
class Disk:
    """Weights that are mapped from a file stay in it; others go to one in ``folder``, or where temporary ones are."""

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


class Store:
    """Where the weights of models live that share one memory: on disk, while no call needs them.

    ``models`` gives all of them as they are now. Those weights go to disk that a plan fetches, when it is made; or with
    ``whole`` all that can, when one of the calls begins. What is mapped and stays by the plan of one call is given back
    when another's begins.

    Raises as ``refuse_elsewhere`` does.
    """

    def __init__(self, disk: Disk, models: Callable[[], Iterable[nn.Module]], whole: bool = False) -> None:
        self.disk, self._models, self._whole = disk, models, whole
        self._lock = threading.Lock()
        self._last: Calls | None = None
        self.refuse_elsewhere()

    def refuse_elsewhere(self) -> None:
        """Raise ``ValueError`` where weights are on another device than the CPU."""
        for tensor in self._tensors():
            if tensor.device.type not in ("cpu", "meta"):
                raise ValueError(
                    f'offload="disk" fetches weights to the CPU alone so far, and there are some on {tensor.device}'
                )

    def take(self, weights: Iterable[torch.Tensor]) -> None:
        """Send home those weights that aren't there yet and can be.

        Raises ``OSError`` where the file can't be written; the models are as they were then.
        """
        found, tensors = [weight for weight in weights if _has_memory(weight)], self._tensors()
        locate(found)
        held = _held_elsewhere(found, tensors)
        storages = {_storage(weight) for weight in found if region_of(weight) is None} - held
        moved = [tensor for tensor in tensors if _storage(tensor) in storages]
        spill(moved, self.disk.folder)
        locate(moved)  # what is known of where they were holds on to the memory there

    def take_all(self) -> None:
        """Send home all weights that can be, and give back the memory of those that are. Raises as ``take`` does."""
        tensors = self._tensors()
        self.take(tensors)
        release(filter(_has_memory, tensors))

    def kept(self) -> set[int]:
        """The storages of weights that can't be moved to disk: something beside the models holds them, too."""
        tensors = self._tensors()
        return _held_elsewhere(filter(_has_memory, tensors), tensors)

    def running(
        self, graph_module: fx.GraphModule, fetched: Collection[str], run: Callable[..., Any]
    ) -> Callable[..., Any]:
        """What runs a planned graph that fetches the weights of these names; the others are read where they are."""
        weights = _weights(graph_module)
        calls = Calls(list(weights.values()), [weight for name, weight in weights.items() if name not in fetched])
        if not self._whole:
            self.take(weight for name, weight in weights.items() if name in fetched)

        def running_run(*tensors: torch.Tensor) -> Any:
            self.begin(calls)
            with files_reused():
                return run(*tensors)

        return running_run

    def begin(self, calls: Calls) -> None:
        """One of these calls begins. Raises ``OSError`` where a file of its weights is shorter than it was."""
        with self._lock:
            last = self._last
            if last is not calls:
                if self._whole:
                    self.take(self._tensors())
                if last is not None:
                    here = set(map(id, calls.staying))
                    release(weight for weight in last.staying if id(weight) not in here)
                self._last = calls
                calls.look()
        calls.check()

    def _tensors(self) -> list[torch.Tensor]:
        return _tensors(self._models())


@dataclass
class Calls:
    """Calls that read these ``weights``, those ``staying`` where they are. ``ends`` are their last bytes, by files."""

    weights: Sequence[torch.Tensor]
    staying: Sequence[torch.Tensor]
    ends: dict[OpenFile, int] = field(default_factory=dict)

    def look(self) -> None:
        """Note where the weights are."""
        ends: dict[OpenFile, int] = {}
        for weight in self.weights:
            region = region_of(weight)
            if region is not None:
                end = region.offset_of(weight.data_ptr()) + weight.numel() * weight.element_size()
                ends[region.file] = max(end, ends.get(region.file, 0))
        self.ends = ends

    def check(self) -> None:
        """Look whether the files are as long as they were.

        Memory that is mapped from a part that a file has lost can't be read: the system ends the process.
        """
        for file, end in self.ends.items():
            found = os.fstat(file.descriptor).st_size
            if found < end:
                raise OSError(
                    f"{file.path} has {found} bytes, and its weights took {end}: it was shortened while in use. Load "
                    "the model again"
                )


def kept_weights(graph_module: fx.GraphModule) -> set[str]:
    """Names of a captured graph's weights that can't be moved to disk: what else lies in their memory is not known.

    That is where something beside the model's parameters and buffers holds on to it, such as an attribute that is a
    view of a weight.
    """
    real = _weights(graph_module)
    locate(real.values())
    held = _held_elsewhere(real.values(), _tensors([getattr(graph_module, ROOT)]))
    return {name for name, weight in real.items() if _storage(weight) in held}


def _tensors(models: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The tensors of models' parameters and buffers, each once."""
    found: dict[int, torch.Tensor] = {}
    for model in models:
        found |= {id(tensor): tensor for tensor in weights_of(model)}
    return list(found.values())


def _held_elsewhere(weights: Iterable[torch.Tensor], tensors: Iterable[torch.Tensor]) -> set[int]:
    """Of the storages of weights in memory, those that something beside these tensors holds."""
    known = Counter(_storage(tensor) for tensor in tensors if _has_memory(tensor))
    held = set()
    for weight in weights:
        storage = weight.untyped_storage()  # which holds on to it once more
        if region_of(weight) is None and torch._C._storage_Use_Count(storage._cdata) > known[storage._cdata] + 1:
            held.add(storage._cdata)
    return held


def _weights(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The weights of a graph that have memory, by their names."""
    names = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    found = {name: operator.attrgetter(name)(graph_module) for name in names}
    return {name: each for name, each in found.items() if isinstance(each, torch.Tensor) and _has_memory(each)}


def _has_memory(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
