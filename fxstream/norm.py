"""Group normalization in two parts: moments, which are small, and a pointwise scale and shift.

The runtime of a norm whose input is never in memory as a whole. Both parts work through their input in tiles that
stay in cache, accumulate in float32 (float64 for float64 inputs) and take any memory format. This file imports torch
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

TILE = 1 << 17
"""Elements that are worked on at once."""


@torch.library.custom_op("fxstream::group_moments", mutates_args=())
def group_moments(input: Tensor, groups: int) -> Tensor:
    """(N, C, *S, L) -> (2, N, groups, *S): mean, and sum of squared deviations from it, over C / groups and L."""
    moments = _moments_like(input, groups)
    values = input.unflatten(1, (groups, -1))
    sizes, cell = (input.shape[0], *input.shape[2:-1]), input.shape[1] * input.shape[-1]
    for samples, *steps in _tiles(sizes, cell):
        tile = values[(samples, slice(None), slice(None), *steps)].to(moments.dtype)
        mean, squares = moments[(slice(None), samples, slice(None), *steps)]
        torch.mean(tile, (2, -1), out=mean)
        torch.sum((tile - mean.unsqueeze(2).unsqueeze(-1)).square_(), (2, -1), out=squares)
    return moments


@group_moments.register_fake
def _moments_like(input: Tensor, groups: int) -> Tensor:
    shape = (2, input.shape[0], groups, *input.shape[2:-1])
    return input.new_empty(shape, dtype=torch.promote_types(input.dtype, torch.float32))


@torch.library.custom_op("fxstream::group_statistics", mutates_args=())
def group_statistics(moments: Tensor, count: int, eps: float) -> Tensor:
    """(2, N, groups, *S) moments of ``count`` elements each -> (2, N, groups): mean and reciprocal deviation."""
    means, squares = moments.reshape(*moments.shape[:3], -1).double()
    mean = means.mean(-1)
    between = (means - mean.unsqueeze(-1)).square_().mean(-1)
    variance = squares.mean(-1).div_(count).add_(between)
    return torch.stack((mean, variance.add_(eps).rsqrt_())).to(moments.dtype)


@group_statistics.register_fake
def _statistics_like(moments: Tensor, count: int, eps: float) -> Tensor:
    return moments.new_empty(moments.shape[:3])


@torch.library.custom_op("fxstream::group_scale", mutates_args=())
def group_scale(input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Normalize (N, C, *S, L) by statistics (2, N, groups), then apply a channel's weight and bias, of shape (C,)."""
    out = _scaled_like(input, statistics, weight, bias)
    mean, scale = statistics.repeat_interleave(input.shape[1] // statistics.shape[2], 2)
    if weight is not None:
        scale = scale * weight
    inner = (1,) * (input.dim() - 2)
    mean, scale = mean.unflatten(1, (-1, *inner)), scale.unflatten(1, (-1, *inner))
    shift = None if bias is None else bias.unflatten(0, (-1, *inner))
    sizes, cell = (input.shape[0], *input.shape[2:-1]), input.shape[1] * input.shape[-1]
    for samples, *steps in _tiles(sizes, cell):
        where = (samples, slice(None), *steps)
        result = out[where]
        tile = result if out.dtype == mean.dtype else input[where].to(mean.dtype)
        torch.sub(input[where] if tile is result else tile, mean[samples], out=tile)
        tile.mul_(scale[samples])
        if shift is not None:
            tile.add_(shift)
        if tile is not result:
            result.copy_(tile)
        del tile
    return out


@group_scale.register_fake
def _scaled_like(input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))  # as the whole norm's output


def tile_elements(shape: Sequence[int]) -> int:
    """Elements of the largest tile that an input (N, C, *S, L) is worked on in."""
    sizes = (shape[0], *shape[2:-1])
    first = next(_tiles(sizes, shape[1] * shape[-1]))
    return shape[1] * shape[-1] * prod(min(size, box.stop) for size, box in zip(sizes, first, strict=True))


def _tiles(sizes: Sequence[int], cell: int) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover ``sizes``, in order, of at most ``TILE`` elements where a step holds ``cell`` of them."""
    if not sizes:
        yield ()
        return
    step = cell * prod(sizes[1:])
    length = max(1, TILE // step)
    for start in range(0, sizes[0], length):
        for box in _tiles(sizes[1:], cell):
            yield slice(start, start + length), *box
