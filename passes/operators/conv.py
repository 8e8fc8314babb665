"""Convolutions, pooling and resampling: samples and channels, and spatial axes, where a slice reads a halo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from fxstream.passes.operators.axes import Call, Cut, Slice, Span, rule
from fxstream.passes.operators.common import cut, haloed, independent, lead, replaced, source, trailing

aten = torch.ops.aten


def at(value: int | Sequence[int], position: int) -> int:
    """The entry of a spatial dimension in an argument that may give one for all."""
    return value if isinstance(value, int) else value[position if len(value) > 1 else 0]


def sliding(
    call: Call, out: Slice, kernel: int, stride: int, padding: int | str, dilation: int, position: int, rank: int
) -> Cut | None:
    """A kernel that slides along a spatial dimension: a step reads the steps under the kernel.

    Inside, a slice is computed without padding. At a border the operator pads as it does; what its padding adds where
    the slice has neighbours is computed for nothing, and left.
    """
    span = dilation * (kernel - 1) + 1
    if padding == 0 and stride == kernel and (kernel == 1 or dilation == 1):
        tiles = source(call).shape[out.dim] == out.size * kernel
        if tiles and (kernel == 1 or out.outer * out.inner > 1):  # no overlap, no gap, no border
            return lead(call, Slice(out.dim, out.extent, out.outer, out.inner * kernel))
    same = isinstance(padding, str)
    before = 0 if padding == "valid" else (span - 1) // 2 if same else int(padding)

    def reads(step: int) -> tuple[int, int]:
        return step * stride - before, step * stride - before + span - 1

    def place(part: Span, window: Span, clipped: bool) -> tuple[Mapping[str, Any], int]:
        if padding == "same":
            return {}, window[0]
        if clipped:
            return {}, window[0] // stride
        if padding == "valid":
            return {}, part[0]
        return {"padding": replaced(call.arguments["padding"], position, rank, 0)}, part[0]

    return haloed(call, out, reads, stride, place, align=stride, least=span)


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
        return None if position == -1 else transposed(call, out, position, len(kernel))
    if position == -1:
        return channels(call, out)
    return sliding(
        call,
        out,
        kernel[position],
        at(given["stride"], position),
        given["padding"] if isinstance(given["padding"], str) else at(given["padding"], position),
        at(given["dilation"], position),
        position,
        len(kernel),
    )


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


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(call: Call, out: Slice) -> Cut | None:
    rank = call.arguments["weight"].dim() - 2
    position = out.dim - (len(call.shape) - rank)
    if position < -1:
        return lead(call, out)
    return None if position == -1 else transposed(call, out, position, rank)


def transposed(call: Call, out: Slice, position: int, rank: int) -> Cut | None:
    """Each input step adds to ``span`` output steps: run on its window, with padding, it begins at the first's."""
    given = call.arguments
    stride, padding = at(given["stride"], position), at(given["padding"], position)
    span = at(given["dilation"], position) * (given["weight"].shape[2 + position] - 1) + 1
    if padding > span - stride:  # its result would begin after the part, and end before it
        return None

    def reads(step: int) -> tuple[int, int]:
        return -((span - 1 - padding - step) // stride), (step + padding) // stride

    def place(part: Span, window: Span, clipped: bool) -> tuple[Mapping[str, Any], int]:
        return {}, window[0] * stride

    return haloed(call, out, reads, Fraction(1, stride), place)


def pool(rank: int, call: Call, out: Slice) -> Cut | None:
    """Pooling over the last ``rank`` dimensions."""
    given = call.arguments
    position = out.dim - (len(call.shape) - rank)
    if position < 0:
        return lead(call, out)
    kernel = at(given["kernel_size"], position)
    stride = at(given["stride"], position) if given["stride"] else kernel
    padding, dilation = at(given["padding"], position), at(given.get("dilation", 1), position)
    return sliding(call, out, kernel, stride, padding, dilation, position, rank)


rule(aten.avg_pool1d.default, aten.max_pool1d.default)(partial(pool, 1))
rule(aten.avg_pool2d.default, aten.max_pool2d.default)(partial(pool, 2))
rule(aten.avg_pool3d.default, aten.max_pool3d.default)(partial(pool, 3))
independent(aten.max_pool1d_with_indices.default, but=trailing(1))
independent(aten.max_pool2d_with_indices.default, but=trailing(2))
independent(aten.max_pool3d_with_indices.default, but=trailing(3))
independent(aten.adaptive_max_pool2d.default, but=trailing(2))
independent(aten.adaptive_max_pool3d.default, but=trailing(3))
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
    times = repeats(call, out)
    if times is None:
        return None
    if out.outer * out.inner == 1:
        return longer(call, out, times, lambda step: (step // times,) * 2)
    if out.inner % times:
        return None
    piece = Slice(out.dim, out.extent, out.outer, out.inner // times)
    return lead(call, piece, lambda length: output_size(call, out, out.outer * length * out.inner))


def repeats(call: Call, out: Slice) -> int | None:
    """How many times longer the output's dimension is, where the kernel's float arithmetic is exact: a power of two."""
    given, size = call.arguments, source(call).shape[out.dim]
    times = out.size // size
    if "scale_factors" in given:
        scales = given["scale_factors"]
    else:
        scales = [given[name] for name in given if name.startswith("scales")]
    if size * times != out.size or times & (times - 1):
        return None
    return None if scales and scales[out.dim - 2] not in (None, times) else times


def longer(call: Call, out: Slice, times: int, reads: Callable[[int], tuple[int, int]]) -> Cut | None:
    """The cut of a dimension that becomes ``times`` as long: a window's result begins at the first step's own."""

    def place(part: Span, window: Span, clipped: bool) -> tuple[Mapping[str, Any], int]:
        return output_size(call, out, (window[1] - window[0]) * times), window[0] * times

    return haloed(call, out, reads, Fraction(1, times), place)


def output_size(call: Call, out: Slice, size: int) -> dict[str, Any]:
    """The argument that gives the output's size, where it is given."""
    if call.arguments.get("output_size") is None:
        return {}
    return {"output_size": [size if dim == out.dim else old for dim, old in enumerate(call.shape)][2:]}


@rule(
    aten.upsample_linear1d.default,
    aten.upsample_linear1d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_trilinear3d.default,
    aten.upsample_trilinear3d.vec,
)
def upsample_linear(call: Call, out: Slice) -> Cut | None:
    """Between the two nearest of the steps' centres."""
    if out.dim < 2:
        return lead(call, out)
    times = repeats(call, out)
    if times is None or call.arguments["align_corners"]:
        return None

    def reads(step: int) -> tuple[int, int]:
        nearest = (2 * step + 1 - times) // (2 * times)
        return nearest, nearest + 1

    return longer(call, out, times, reads)


independent(
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bilinear2d_aa.vec,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
    but=trailing(2),
)


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(call: Call, out: Slice) -> Cut | None:
    """Each step of rows or columns becomes ``times`` of them, out of channels."""
    times, position = call.arguments["upscale_factor"], out.dim - len(call.shape)
    if position < -2:
        return None if position == -3 else lead(call, out)
    if out.inner % times == 0:
        return lead(call, Slice(out.dim, out.extent, out.outer, out.inner // times))

    return longer(call, out, times, lambda step: (step // times,) * 2)


@rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Call, out: Slice) -> Cut | None:
    """``times`` steps of rows or columns become one, and channels."""
    times, position = call.arguments["downscale_factor"], out.dim - len(call.shape)
    if position < -2:
        return None if position == -3 else lead(call, out)
    if out.outer * out.inner > 1:
        return lead(call, Slice(out.dim, out.extent, out.outer, out.inner * times))

    def place(part: Span, window: Span, clipped: bool) -> tuple[Mapping[str, Any], int]:
        return {}, part[0]

    return haloed(call, out, lambda step: (step * times, step * times + times - 1), times, place)


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(call: Call, out: Slice) -> Cut | None:
    """Each pixel of the output is sampled, at the place that the grid has for it, of the whole image."""
    if out.dim == 1:
        return lead(call, out)
    if out.dim == 0:
        return cut(call, {"input": out, "grid": out})
    return cut(call, {"grid": out.at(out.dim - 1)})
