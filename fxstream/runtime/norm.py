"""Group normalization in two parts: moments, which are small, and a pointwise scale and shift.

The runtime of a norm whose input is never in memory as a whole. Both parts accumulate in float32 (float64 for float64
inputs) and take any memory format. On a CPU they work through their input in tiles that stay in cache. On CUDA, whose
kernels convert types as they read and write, nothing has to be converted apart, and each is a few kernels. Elsewhere
tiles are larger: a launch costs more than a cache saves. This file imports torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from operator import itemgetter

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

TILE, LARGE_TILE = 1 << 18, 1 << 24
"""Elements that are worked on at once, on a CPU and elsewhere."""

Steps = tuple[Sequence[int], Sequence[int], int, int]
"""Sizes and strides of the dimensions that an input is cut along, the elements in one step of them all, and those that
a tile holds at most."""


@torch.library.custom_op("fxstream::group_moments", mutates_args=())
def group_moments(input: Tensor, groups: int) -> Tensor:
    """(N, C, *S, L) -> (2, N, groups, *S): mean, and sum of squared deviations from it, over C / groups and L."""
    moments = _moments_like(input, groups)
    means, squares = moments
    values = input.unflatten(1, (groups, -1)).movedim(2, -2)
    if at_once(input):
        moments_at_once(values, means, squares)
        return moments
    of = _moments_by_row if channels_last(input) else _moments
    for box in _tiles(*_steps_of_groups(input, groups)):
        means[box], squares[box] = of(values[box].to(moments.dtype))
    return moments


def moments_at_once(values: Tensor, means: Tensor, squares: Tensor) -> None:
    """Moments over the last two dimensions, by kernels that read what is there and write another type."""
    torch.mean(values, (-2, -1), dtype=means.dtype, out=means)
    torch.var(values, (-2, -1), correction=0, out=squares)
    squares.mul_(values.shape[-1] * values.shape[-2])


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
    between, mean = torch.var_mean(means, -1, correction=0)
    variance = between.add_(squares.mean(-1), alpha=1 / count)
    return torch.stack((mean, variance.add_(eps).rsqrt_())).to(moments.dtype)


@group_statistics.register_fake
def _statistics_like(moments: Tensor, count: int, eps: float) -> Tensor:
    return moments.new_empty(moments.shape[:3])


@torch.library.custom_op("fxstream::group_scale", mutates_args=())
def group_scale(input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Normalize (N, C, *S, L) by statistics (2, N, groups), then apply a weight and a bias.

    Both have one element a channel, shape (C,), or one an element, shape (C, *S, L).
    """
    out = _scaled_like(input, statistics, weight, bias)
    count = input.shape[1] // statistics.shape[2]
    mean, scale = statistics.unsqueeze(-1).expand(*statistics.shape, count).flatten(2)
    if weight is not None and weight.dim() == 1:
        scale, weight = scale * weight, None
    inner = (1,) * (input.dim() - 2)
    if at_once(input) and weight is None and (bias is None or bias.dim() == 1):
        return scaled_at_once(input, mean, scale, bias, out)
    mean, scale = mean.unflatten(1, (-1, *inner)), scale.unflatten(1, (-1, *inner))
    by_channel = bias is not None and bias.dim() == 1
    if bias is not None and by_channel:
        bias = bias.unflatten(0, (-1, *inner))
    for box in _tiles(*_steps(input)):
        samples, channels, *_ = box
        result, part = out[box], input[box]
        tile = result if out.dtype == mean.dtype else part.to(mean.dtype)
        torch.sub(part if tile is result else tile, mean[samples, channels], out=tile)
        tile.mul_(scale[samples, channels])
        if weight is not None:
            tile.mul_(weight[box[1:]])
        if bias is not None:
            tile.add_(bias[channels] if by_channel else bias[box[1:]])
        if tile is not result:
            result.copy_(tile)
        del tile
    return out


def scaled_at_once(input: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``input`` times ``scale``, (N, C), plus what ``mean`` and ``bias`` make of a shift, as CUDA's own norm has it."""
    shift = mean.mul(scale).neg_() if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    inner = (-1, *(1,) * (input.dim() - 2))
    return torch.addcmul(shift.unflatten(1, inner), input, scale.unflatten(1, inner), out=out)


@group_scale.register_fake
def _scaled_like(input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.empty_like(input, memory_format=scaled_format(input))


def channels_last(input: Tensor) -> bool:
    """Whether channels lie closer together than steps of the last dimension."""
    return input.stride(1) < input.stride(-1)


def scaled_format(input: Tensor) -> torch.memory_format:
    """How the output lies, as the whole norm's does: on CUDA always contiguous."""
    return torch.contiguous_format if input.is_cuda else suggest_memory_format(input)


def at_once(input: Tensor) -> bool:
    """Whether the kernels of the input's device read one type and write another, without a copy of all of it."""
    return input.is_cuda


def moments_tile(input: Tensor, groups: int) -> int:
    """Elements of the largest tile that moments are taken of at once, elsewhere than on CUDA."""
    return _largest(*_steps_of_groups(input, groups))


def scale_tile(input: Tensor) -> int:
    """Elements of the largest tile that is scaled at once, on CUDA where the affine has a value an element."""
    return _largest(*_steps(input))


def _steps_of_groups(input: Tensor, groups: int) -> Steps:
    """Of (N, groups, *S) with C / groups and L in each step; what a tile holds at most."""
    channels = input.shape[1] // groups
    (samples, _, *inner), (stride, step, *strides) = input.shape[:-1], input.stride()[:-1]
    return (samples, groups, *inner), (stride, step * channels, *strides), channels * input.shape[-1], _size(input)


def _steps(input: Tensor) -> Steps:
    """Of (N, C, *S) with L in each step; what a tile holds at most."""
    return input.shape[:-1], input.stride()[:-1], input.shape[-1], _size(input)


def _size(input: Tensor) -> int:
    return TILE if input.device.type == "cpu" else LARGE_TILE


def _largest(sizes: Sequence[int], strides: Sequence[int], cell: int, most: int) -> int:
    first = next(_tiles(sizes, strides, cell, most))
    return cell * prod(min(size, part.stop) for size, part in zip(sizes, first, strict=True))


def _tiles(sizes: Sequence[int], strides: Sequence[int], cell: int, most: int) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover ``sizes`` in the order of memory, of ``most`` elements at most where a step holds ``cell``."""
    order = sorted(range(len(sizes)), key=lambda dim: -strides[dim])
    parts, rest = [], cell * prod(sizes)
    for dim in order:
        rest //= sizes[dim]
        length = max(1, min(most // rest, sizes[dim]))
        parts.append([slice(start, start + length) for start in range(0, sizes[dim], length)])
    for box in product(*parts):
        yield tuple(part for _, part in sorted(zip(order, box, strict=True), key=itemgetter(0)))
