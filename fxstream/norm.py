"""Group normalization in two parts: moments, which are small, and a pointwise scale and shift.

The runtime of a norm whose input is never in memory as a whole. Both parts work through their input in tiles that
stay in cache, accumulate in float32 (float64 for float64 inputs) and take any memory format. This file imports torch
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from operator import itemgetter

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

TILE = 1 << 18
"""Elements that are worked on at once."""


@torch.library.custom_op("fxstream::group_moments", mutates_args=())
def group_moments(input: Tensor, groups: int) -> Tensor:
    """(N, C, *S, L) -> (2, N, groups, *S): mean, and sum of squared deviations from it, over C / groups and L."""
    moments = _moments_like(input, groups)
    means, squares = moments
    values = grouped(input, groups)
    of = _moments_by_row if channels_last(values) else _moments
    for box in _tiles(values, 2):
        means[box], squares[box] = of(values[box].to(moments.dtype))
    return moments


def _moments(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the last two dimensions, and sum of squared deviations from it."""
    mean = tile.mean((-2, -1))
    return mean, (tile - mean[..., None, None]).square_().sum((-2, -1))


def _moments_by_row(tile: Tensor) -> tuple[Tensor, Tensor]:
    """The same by way of each channel's: kernels are slow over a few channels that lie innermost."""
    values = tile.movedim(1, -3).flatten(-3, -2)
    rows = values.mean(-1)
    squares = (values - rows.unsqueeze(-1)).square_().sum(-1)
    rows, squares = (each.unflatten(-1, (-1, tile.shape[-2])).movedim(-2, 1) for each in (rows, squares))
    mean = rows.mean(-1)
    between = (rows - mean.unsqueeze(-1)).square_().sum(-1)
    return mean, squares.sum(-1).add_(between, alpha=tile.shape[-1])


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
    for box in _tiles(input, 1):
        samples, channels, *_ = box
        result, part = out[box], input[box]
        tile = result if out.dtype == mean.dtype else part.to(mean.dtype)
        torch.sub(part if tile is result else tile, mean[samples, channels], out=tile)
        tile.mul_(scale[samples, channels])
        if shift is not None:
            tile.add_(shift[channels])
        if tile is not result:
            result.copy_(tile)
        del tile
    return out


@group_scale.register_fake
def _scaled_like(input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.empty_like(input, memory_format=suggest_memory_format(input))  # as the whole norm's output


def grouped(input: Tensor, groups: int) -> Tensor:
    """(N, C, *S, L) -> (N, groups, *S, C / groups, L), a view."""
    return input.unflatten(1, (groups, -1)).movedim(2, -2)


def channels_last(values: Tensor) -> bool:
    """Whether channels of a group lie closer together than steps of the last dimension."""
    return values.stride(-2) < values.stride(-1)


def tile_elements(input: Tensor, inner: int) -> int:
    """Elements of the largest tile that an input is worked on in, which holds its last ``inner`` dimensions whole."""
    first = next(_tiles(input, inner))
    sizes = zip(input.shape, first, strict=False)
    return prod(input.shape[-inner:]) * prod(min(size, part.stop) for size, part in sizes)


def _tiles(input: Tensor, inner: int) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover all but the last ``inner`` dimensions, in the order of memory, of ``TILE`` elements at most.

    Where the last ``inner`` dimensions have more, a box is of one step.
    """
    order = sorted(range(input.dim() - inner), key=lambda dim: -input.stride(dim))
    parts, rest = [], prod(input.shape)
    for dim in order:
        rest //= input.shape[dim]
        length = max(1, min(TILE // rest, input.shape[dim]))
        parts.append([slice(start, start + length) for start in range(0, input.shape[dim], length)])
    for box in product(*parts):
        yield tuple(part for _, part in sorted(zip(order, box, strict=True), key=itemgetter(0)))
