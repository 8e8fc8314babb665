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
    where = {"dtype": moments.dtype, "device": input.device}
    rows, squares = (torch.empty_permuted(input.shape[:-1], _order(input), **where) for _ in range(2))
    for box in _tiles(input):
        tile = input[box].to(moments.dtype)
        mean = torch.mean(tile, -1, out=rows[box])
        torch.sum((tile - mean.unsqueeze(-1)).square_(), -1, out=squares[box])
    rows, squares = rows.unflatten(1, (groups, -1)), squares.unflatten(1, (groups, -1))
    means, total = moments
    torch.mean(rows, 2, out=means)
    torch.sum(squares, 2, out=total)
    between = (rows - means.unsqueeze(2)).square_().sum(2)
    total.add_(between, alpha=input.shape[-1])
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
    for box in _tiles(input):
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


def tile_elements(input: Tensor) -> int:
    """Elements of the largest tile that an input is worked on in."""
    first = next(_tiles(input))
    return input.shape[-1] * prod(min(size, part.stop) for size, part in zip(input.shape, first, strict=False))


def _tiles(input: Tensor) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover all dimensions but the last, in the order of memory, of at most ``TILE`` elements or one row."""
    order = _order(input)
    parts, rest = [], prod(input.shape)
    for dim in order:
        rest //= input.shape[dim]
        length = max(1, min(TILE // rest, input.shape[dim]))
        parts.append([slice(start, start + length) for start in range(0, input.shape[dim], length)])
    for box in product(*parts):
        yield tuple(part for _, part in sorted(zip(order, box, strict=True), key=itemgetter(0)))


def _order(input: Tensor) -> list[int]:
    """All dimensions but the last, the outermost in memory first."""
    return sorted(range(input.dim() - 1), key=lambda dim: -input.stride(dim))
