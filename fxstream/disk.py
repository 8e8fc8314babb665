"""Weights at home on disk: what ``offload`` may say, and how weights get there."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.runtime.files import locate, region_of
from fxstream.runtime.spill import spill

if TYPE_CHECKING:
    from fxstream.planned import Compiled


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
        if folder and not Path(folder).is_dir():
            raise ValueError(f"offload {offload!r}: there is no folder {folder}")
        return Disk(folder or None)

    def take(self, compiled: Compiled, model: nn.Module) -> None:
        """Send home the weights of a model that a planned call fetches, and that are nowhere on disk yet.

        Raises ``OSError`` where the file can't be written; the model is as it was then.
        """
        names = {fetched.name for fetched in compiled.plan.fetched}
        weights = [operator.attrgetter(name)(compiled.graph_module) for name in names]
        if any(isinstance(weight, FakeTensor) or weight.is_meta for weight in weights):
            return
        locate(weights)
        storages = {_storage(weight) for weight in weights if region_of(weight) is None}
        spill([tensor for tensor in _tensors(model) if _storage(tensor) in storages], self.folder)


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
