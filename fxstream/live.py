"""Live: what operators have made and something still holds, without a graph to tell it."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxstream.passes.graph.structure import flatten


class Live(TorchDispatchMode):
    """Knows the storages with memory that were made under it, or added, and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, value: Any) -> None:
        """Count the tensors in a value, too."""
        for tensor in flatten(value)[0]:
            if not isinstance(tensor, FakeTensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)

    def bytes(self, apart: Collection[int] = ()) -> int:
        """Bytes of the storages that are alive, those with the keys ``apart`` not counted."""
        alive = {key: storage for key, ref in self._storages.items() if (storage := ref()) is not None}
        self._storages = {key: self._storages[key] for key in alive}
        return sum(storage.nbytes() for key, storage in alive.items() if key not in apart)
