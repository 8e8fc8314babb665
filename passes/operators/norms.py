"""Norms and softmax: every dimension that the statistics do not span.

GroupNorm's span all pixels (and frames, where it sees them) of a group of channels, so it is cut along samples and
along whole groups. Split into moments and a scale (``split_norms``), it is cut along frames and rows too.
"""

from __future__ import annotations

import torch

import fxstream.runtime.norm  # noqa: F401  (registers its operators)
from fxstream.passes.operators.axes import Call, Cut, Slice, rule
from fxstream.passes.operators.common import cut, independent, lead

aten, norm = torch.ops.aten, torch.ops.fxstream

independent(
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    but=lambda call: [call.arguments["dim"]],
)
independent(
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
    but=lambda call: range(-len(call.arguments["normalized_shape"]), 0),
)


@rule(aten.group_norm.default)
def group_norm(call: Call, out: Slice) -> Cut | None:
    if out.dim == 0:
        return lead(call, out)
    group = call.shape[1] // call.arguments["num_groups"]
    if out.dim > 1 or out.inner % group:
        return None
    groups = out.outer * out.inner // group
    pieces = {"input": out, "weight": out.at(0), "bias": out.at(0)}
    return cut(call, pieces, lambda length: {"num_groups": groups * length})


@rule(norm.group_moments.default)
def group_moments(call: Call, out: Slice) -> Cut | None:
    """(N, C, *S, L) -> (2, N, groups, *S)."""
    groups = call.arguments["groups"]
    if out.dim == 0:
        return None
    if out.dim != 2:
        return lead(call, out.at(out.dim - 1))
    channels = call.tensors[0].shape[1] // groups
    piece = Slice(1, out.extent, out.outer, out.inner * channels)
    return lead(call, piece, lambda length: {"groups": groups // out.extent * length})


@rule(norm.group_statistics.default)
def group_statistics(call: Call, out: Slice) -> Cut | None:
    return None if out.dim == 0 else lead(call, out)


@rule(norm.group_scale.default)
def group_scale(call: Call, out: Slice) -> Cut | None:
    """(N, C, *S, L), with statistics (2, N, groups), and a weight and a bias a channel or an element."""
    if out.dim == 0:
        return cut(call, {"input": out, "statistics": out.at(1)})
    if out.dim > 1:
        affine = {name: call.arguments[name] for name in ("weight", "bias")}
        each = {name: out.at(out.dim - 1) for name, tensor in affine.items() if tensor is not None and tensor.dim() > 1}
        return cut(call, {"input": out} | each)
    groups = call.arguments["statistics"].shape[2]
    channels = out.size // groups
    if out.inner % channels:
        return None
    statistics = Slice(2, out.extent, out.outer, out.inner // channels)
    return cut(call, {"input": out, "statistics": statistics, "weight": out.at(0), "bias": out.at(0)})


@rule(aten.batch_norm.default)
def batch_norm(call: Call, out: Slice) -> Cut | None:
    """A pointwise scale and shift in inference."""
    if call.arguments["training"]:
        return None
    channels = out.at(0) if out.dim == 1 else None
    return cut(call, {"input": out} | dict.fromkeys(("weight", "bias", "running_mean", "running_var"), channels))
