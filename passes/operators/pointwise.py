"""Pointwise operators: each output element comes from the input elements that broadcast to it."""

from __future__ import annotations

import torch
from torch._ops import OpOverload, OpOverloadPacket

from fxstream.passes.operators.axes import Call, Cut, Slice, rule
from fxstream.passes.operators.common import broadcast, cut

aten = torch.ops.aten

ARITHMETIC = """
    add sub rsub mul div true_divide floor_divide fmod remainder pow float_power addcmul addcdiv lerp
    maximum minimum fmax fmin atan2 hypot copysign nextafter ldexp logaddexp logaddexp2 xlogy heaviside polar complex
    neg abs sign sgn angle reciprocal square sqrt rsqrt exp exp2 expm1 log log1p log2 log10 logit sinc i0
    sin cos tan sinh cosh asin acos atan asinh acosh atanh deg2rad rad2deg erf erfc erfinv lgamma digamma
    floor ceil round trunc frac clamp clamp_min clamp_max nan_to_num copy
"""
ACTIVATIONS = """
    sigmoid log_sigmoid tanh relu relu6 silu gelu mish softplus leaky_relu elu celu selu hardtanh hardsigmoid hardswish
    threshold hardshrink softshrink
"""
LOGIC = """
    eq ne lt le gt ge logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
    bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__
    isnan isinf isposinf isneginf isfinite isclose signbit
    where masked_fill fill
"""


def overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    """The functional overloads of an operator that map tensors to a tensor."""
    found = [getattr(packet, name) for name in packet.overloads()]
    return [
        operator
        for operator in found
        if not operator._schema.is_mutable
        and [str(result.type) for result in operator._schema.returns] == ["Tensor"]
        and any(str(argument.type) == "Tensor" for argument in operator._schema.arguments)
    ]


for _name in (ARITHMETIC + ACTIVATIONS + LOGIC).split():
    rule(*overloads(getattr(aten, _name)))(broadcast)

rule(
    aten.clone.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten._conj.default,
    aten._conj_physical.default,
    aten.resolve_conj.default,
    aten._neg_view.default,
    aten.resolve_neg.default,
)(broadcast)


@rule(aten.prelu.default, aten._prelu_kernel.default)
def prelu(call: Call, out: Slice) -> Cut:
    """A factor a channel, or one for all."""
    own = out.dim == 1 and call.tensors[1].numel() > 1
    channels = call.arguments["weight"].dim() - 1 if call.target is aten.prelu.default else 1
    return cut(call, {"self": out, "weight": out.at(channels) if own else None})


@rule(aten.dropout.default)
def dropout(call: Call, out: Slice) -> Cut | None:
    """The identity in inference; random numbers of a slice are not those of the whole."""
    return None if call.arguments["train"] else broadcast(call, out)


@rule(aten.type_as.default)
def type_as(call: Call, out: Slice) -> Cut:
    """Only the dtype of ``other`` matters: a piece of it will do, where it has the same shape."""
    same = call.arguments["other"].shape == call.shape
    return cut(call, {"self": out, "other": out if same else None})
