"""Layouts: how kernels lay out what they make, where fake values are laid out in another way.

Torch's fake values follow the kernels of the device, where it is there. Those of a device that isn't are made as its
kernels would be chosen here, so its own choices are made again: of convolutions and of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

from fxstream.passes.machine.choices import CONVOLUTIONS, EFFICIENT, FLASH, attention_kernel, convolution_format
from fxstream.passes.machine.kept import is_here

aten = torch.ops.aten

Layout = Callable[..., Tensor]
"""Of a call's arguments without memory, a tensor that lies as the call's result does."""


def layouts_on(device: torch.device) -> Mapping[Any, Layout]:
    """The operators on a device whose results lie otherwise than their fake values."""
    if device.type == "cuda":
        return CUDA if is_here("cuda") else ABSENT_CUDA
    return CPU if device.type == "cpu" else {}


def _suggested(input: Tensor, *rest: Any, **others: Any) -> Tensor:
    """Channels last where the input is, else contiguous."""
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _contiguous(input: Tensor, *rest: Any, **others: Any) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _rolled(input: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    """One dimension after the other, a concatenation of the two parts."""
    if not dims:
        return _contiguous(input)
    for shift, dim in zip(shifts, dims, strict=True):
        rest = shift % max(input.shape[dim], 1)
        parts = input.split([input.shape[dim] - rest, rest], dim)
        input = torch.cat(parts[::-1], dim) if rest else _contiguous(input)
    return input


def _convolved(target: OpOverload) -> Layout:
    def layout(input: Tensor, weight: Tensor, *rest: Any, **others: Any) -> Tensor:
        made = target(input, weight, *rest, **others).contiguous()
        return made.contiguous(memory_format=convolution_format(input, weight))

    return layout


def _attended(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **others: Any) -> Tensor:
    kernel = attention_kernel(query, key, value, *rest, **others)
    shape = (*query.shape[:-1], value.shape[-1])
    if kernel == FLASH:
        return torch.empty_like(query)
    if kernel == EFFICIENT:  # heads innermost but one
        batch, heads, length, size = shape
        return query.new_empty(batch, length, heads, size).transpose(1, 2)
    return query.new_empty(shape)


CPU: dict[OpOverload, Layout] = {
    aten.group_norm.default: _suggested,
    aten.batch_norm.default: _suggested,
    aten._native_batch_norm_legit_no_training.default: _suggested,
    aten.channel_shuffle.default: _suggested,
    aten.log_sigmoid.default: _contiguous,
    aten.roll.default: _rolled,
}

CUDA: dict[OpOverload, Layout] = {
    aten.group_norm.default: _contiguous,
    aten.roll.default: _contiguous,
}

ABSENT_CUDA = CUDA | {each: _convolved(each) for each in CONVOLUTIONS}
ABSENT_CUDA[aten.scaled_dot_product_attention.default] = _attended
