"""Products with quantized weights, and what libraries of such weights have for operators: rows are free in all of them.

A library's operators are registered by name: they are there once it is imported.
"""

from __future__ import annotations

import torch

from fxstream.passes.operators.axes import Call, Cut, Slice, rule
from fxstream.passes.operators.common import lead
from fxstream.passes.operators.matmul import product

aten = torch.ops.aten


def _in_a_row(out: Slice) -> bool:
    """Whether a slice lies in one stretch of a tensor that does: kernels refuse what doesn't."""
    return out.dim == 0 and out.outer == 1


@rule(aten._weight_int8pack_mm.default, aten._weight_int4pack_mm_for_cpu.default)
def packed_mm(call: Call, out: Slice) -> Cut | None:
    """Each row by itself; the weight is in an order of its own, or has to be in one stretch."""
    return lead(call, out) if _in_a_row(out) else None


@rule(aten._int_mm.default)
def int_mm(call: Call, out: Slice) -> Cut | None:
    """On a GPU few rows are refused, so there the axis stops."""
    return None if call.tensors[0].is_cuda else product(call, out, {"self": "mk", "mat2": "kn"}, "mn")


@rule(aten._scaled_mm.default)
def scaled_mm(call: Call, out: Slice) -> Cut | None:
    """With one scale for all, or one for each row and each column."""
    terms = {"self": "mk", "mat2": "kn", "scale_a": "mi", "scale_b": "in", "bias": "n"}
    scales = [call.arguments[name] for name in ("scale_a", "scale_b")]
    alone = [name for name, scale in zip(("scale_a", "scale_b"), scales, strict=True) if scale.numel() == 1]
    rows = len(call.arguments["scale_a"].shape) == 2 and call.arguments["scale_a"].shape[1] == 1 and _in_a_row(out)
    if call.arguments["scale_result"] is not None or (len(alone) < 2 and not rows):
        return None
    return product(call, out, {name: term for name, term in terms.items() if name not in alone}, "mn")


@rule("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit")
def four_bit_mm(call: Call, out: Slice) -> Cut | None:
    return None if out.dim == len(call.shape) - 1 else lead(call, out)


@rule("quanto::qbytes_mm")
def qbytes_mm(call: Call, out: Slice) -> Cut | None:
    """Of a matrix, its kernels may want the rows in one stretch; of what has more dimensions they make one."""
    free = _in_a_row(out) if len(call.shape) == 2 else out.dim < len(call.shape) - 1
    return lead(call, out) if free else None


@rule("bitsandbytes::int8_scaled_mm")
def int8_scaled_mm(call: Call, out: Slice) -> Cut | None:
    """The scales of rows are in one dimension, whatever the rows are in."""
    if call.arguments["A"].dim() != 2:
        return None
    return product(call, out, {"A": "mk", "B": "nk", "row_stats": "m", "col_stats": "n", "bias": "n"}, "mn")


@rule("bitsandbytes::int8_vectorwise_quant")
def int8_vectorwise_quant(call: Call, out: Slice) -> Cut | None:
    """Each row by its largest number. With a threshold, columns of all rows are told apart."""
    rows = call.arguments["A"].dim() == 2 and not call.arguments["threshold"]
    return lead(call, out) if rows and out.dim == 0 else None
