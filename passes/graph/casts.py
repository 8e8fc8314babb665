"""Casts: a forward that casts weights to compute with them, and back.

A model whose weights are stored in eight bits may cast those of a module before it runs, and back after it. While it is
traced that would need a weight of another type in place of a fake one, which torch refuses; so the trace has the cast
value there, and what is cast back is the weight again, if nothing was lost on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fxstream.passes.graph.parts import WEIGHTS


@contextmanager
def casts_traced() -> Iterator[None]:
    """Let ``module.to(dtype)`` and its kin act on the modules of a trace, in this thread."""
    apply, thread = nn.Module._apply, get_ident()
    cast: dict[int, tuple[Tensor, Tensor]] = {}

    def traced_apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if get_ident() != thread:
            return apply(module, fn, recurse)
        for child in module.children() if recurse else ():
            child._apply(fn)
        for table in WEIGHTS:
            for name, value in vars(module)[table].items():
                if value is not None:
                    vars(module)[table][name] = of(value, fn(value))
        return module

    def of(value: Tensor, made: Tensor) -> Tensor:
        if made is value:
            return value
        _, weight = cast.get(id(value), (value, value))
        if _layout(made) == _layout(weight) and _keeps(weight.dtype, value.dtype):
            return weight
        cast[id(made)] = made, weight
        return made

    with patch.object(nn.Module, "_apply", traced_apply):
        yield


def _layout(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _keeps(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every number of one type is one of another."""
    if narrow == wide:
        return True
    if not (narrow.is_floating_point and wide.is_floating_point):
        return False
    a, b = torch.finfo(narrow), torch.finfo(wide)
    return b.eps <= a.eps and b.max >= a.max and b.smallest_normal * b.eps <= a.smallest_normal * a.eps
