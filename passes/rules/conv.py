"""Convolutions, pooling and upsampling: samples and channels, and the axes whose windows do not overlap.

Along an axis where windows overlap, a slice reads a halo of its neighbours: that is not a slice, and no rule here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fxstream.passes.axes import Call, Cut, Slice, rule
from fxstream.passes.rules.common import cut, independent, lead, source, trailing

aten = torch.ops.aten


def at(value: int | Sequence[int], position: int) -> int:
    """The entry of a spatial dimension in an argument that may give one for all."""
    return value if isinstance(value, int) else value[position if len(value) > 1 else 0]


def disjoint(call: Call, out: Slice, kernel: int, stride: int, padding: int, dilation: int) -> Slice | None:
    """The input's piece where windows of ``kernel`` tile the dimension: no overlap, no gap, no border."""
    tiles = stride == kernel and padding == 0 and (kernel == 1 or dilation == 1)
    if not tiles or source(call).shape[out.dim] != out.size * kernel:
        return None
    return Slice(out.dim, out.extent, out.outer, out.inner * kernel)


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)
def convolution(call: Call, out: Slice) -> Cut | None:
    given = call.arguments
    kernel = given["weight"].shape[2:]
    position = out.dim - (len(call.shape) - len(kernel))
    if position < -1:
        return lead(call, out)
    if given.get("transposed"):
        return None
    if position == -1:
        return channels(call, out)
    padding = given["padding"]
    if isinstance(padding, str):  # "same" wants stride 1: where that is the kernel's size too, it pads nothing
        padding = 0
    piece = disjoint(
        call,
        out,
        kernel[position],
        at(given["stride"], position),
        at(padding, position),
        at(given["dilation"], position),
    )
    return lead(call, piece)


def channels(call: Call, out: Slice) -> Cut | None:
    """Output channels: those of the weight, and whole groups of the input where there are groups."""
    groups, weight = call.arguments["groups"], call.arguments["weight"]
    pieces: dict[str, Any] = {"weight": out.at(0), "bias": out.at(0)}
    if groups == 1:
        return cut(call, pieces)
    group = out.size // groups
    if out.inner % group:
        return None
    pieces["input"] = Slice(out.dim, out.extent, out.outer, out.inner // group * weight.shape[1])
    return cut(call, pieces, lambda length: {"groups": out.outer * length * out.inner // group})


independent(aten.conv_transpose1d.default, but=trailing(2))
independent(aten.conv_transpose2d.input, but=trailing(3))
independent(aten.conv_transpose3d.input, but=trailing(4))


def pool(rank: int, call: Call, out: Slice) -> Cut | None:
    """Pooling over the last ``rank`` dimensions."""
    given = call.arguments
    position = out.dim - (len(call.shape) - rank)
    if position < 0:
        return lead(call, out)
    kernel = at(given["kernel_size"], position)
    stride = at(given["stride"], position) if given["stride"] else kernel
    piece = disjoint(call, out, kernel, stride, at(given["padding"], position), at(given.get("dilation", 1), position))
    return lead(call, piece)


rule(aten.avg_pool1d.default, aten.max_pool1d.default)(partial(pool, 1))
rule(aten.avg_pool2d.default, aten.max_pool2d.default)(partial(pool, 2))
rule(aten.avg_pool3d.default, aten.max_pool3d.default)(partial(pool, 3))
independent(aten.max_pool2d_with_indices.default, but=trailing(2))
independent(aten.adaptive_avg_pool1d.default, but=trailing(1))
independent(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default, but=trailing(2))
independent(aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d.default, but=trailing(3))


@rule(
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.default,
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
)
def upsample_nearest(call: Call, out: Slice) -> Cut | None:
    """Along rows too where each is repeated a power of two times: then the kernels' float arithmetic is exact."""
    if out.dim < 2:
        return lead(call, out)
    given = call.arguments
    size = source(call).shape[out.dim]
    times = out.size // size
    if "scale_factors" in given:
        scales = given["scale_factors"]
    else:
        scales = [given[name] for name in given if name.startswith("scales")]
    if size * times != out.size or times & (times - 1) or out.inner % times:
        return None
    if scales and scales[out.dim - 2] not in (None, times):
        return None
    piece = Slice(out.dim, out.extent, out.outer, out.inner // times)
    if given["output_size"] is None:
        return lead(call, piece)
    return lead(call, piece, lambda length: {"output_size": out.resized(call.shape, length)[2:]})


independent(aten.upsample_linear1d.default, aten.upsample_linear1d.vec, but=trailing(1))
independent(
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bilinear2d_aa.vec,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
    but=trailing(2),
)
independent(aten.upsample_trilinear3d.default, aten.upsample_trilinear3d.vec, but=trailing(3))
independent(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, but=trailing(3))
