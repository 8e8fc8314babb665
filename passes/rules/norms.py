"""Norms and softmax: every dimension that the statistics do not span.

GroupNorm's span all pixels (and frames, where it sees them) of a group of channels, so it is cut along samples and
along whole groups. Where a longer axis must be cut, another pass splits it into statistics and a pointwise scale.
"""

from __future__ import annotations

import torch

from fxstream.passes.axes import Call, Cut, Slice, rule
from fxstream.passes.rules.common import cut, independent, lead

aten = torch.ops.aten

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


@rule(aten.batch_norm.default)
def batch_norm(call: Call, out: Slice) -> Cut | None:
    """A pointwise scale and shift in inference."""
    if call.arguments["training"]:
        return None
    channels = out.at(0) if out.dim == 1 else None
    return cut(call, {"input": out} | dict.fromkeys(("weight", "bias", "running_mean", "running_var"), channels))
