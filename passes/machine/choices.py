"""Choices that torch makes on CUDA, for a card that isn't there to be asked: of attention, and of convolutions.

Attention has the kernels of `sdp_utils.cpp` for a card of capability 8.0 or later that is not a data center's of 9.0 or
10.0: flash attention where it may, else the memory-efficient kernel, else plain products with the scores in memory.
Convolutions lie as `ConvUtils.h` has it for cuDNN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fxstream.passes.machine.cost import REDUCED

aten = torch.ops.aten

CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
)
"""All operators that cuDNN convolves for."""

FLASH, EFFICIENT, MATH = "flash", "efficient", "math"


def attention_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> str:
    """The kernel that ``scaled_dot_product_attention`` takes of these arguments, by its name here."""
    heads = [each.shape[-1] for each in (query, key, value)]
    if any(each.dim() != 4 or not each.numel() or not _ends_dense(each) for each in (query, key, value)):
        return MATH
    plain = attn_mask is None and (not is_causal or query.shape[-2] == key.shape[-2])
    if plain and query.dtype in REDUCED and len(set(heads)) == 1 and heads[0] <= 256:
        return FLASH
    step = 8 if query.dtype in REDUCED else 4
    known = query.dtype in (*REDUCED, torch.float32)
    return EFFICIENT if known and heads[0] == heads[1] and not any(size % step for size in heads) else MATH


def _ends_dense(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def convolution_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """How a convolution's tensors lie: with channels last where the input or the weight does, but in float64."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if last is None or input.dtype == torch.float64 or last not in map(suggest_memory_format, (input, weight)):
        return torch.contiguous_format
    return last
