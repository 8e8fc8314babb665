"""Attention: batch and heads are independent; so are queries, which all read the whole keys and values.

The last dimension, that of the values, is refused though it is independent too: the fused kernels want it equal to
that of the queries, and without them the scores would be stored.
"""

from __future__ import annotations

import torch

from fxstream.passes.operators.axes import Call, Cut, Slice, rule
from fxstream.passes.operators.common import Piece, aligned, cut

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(call: Call, out: Slice) -> Cut | None:
    given, rank = call.arguments, len(call.shape)
    causal = given["is_causal"] and out.dim == rank - 2
    if given["dropout_p"] or causal or out.dim == rank - 1:
        return None
    pieces: dict[str, Piece] = {"query": aligned(given["query"], rank, out)}
    if given["attn_mask"] is not None:
        pieces["attn_mask"] = aligned(given["attn_mask"], rank, out)
    if out.dim < rank - 2:
        for name in ("key", "value"):
            dim = out.dim - rank + given[name].dim()
            count = given[name].shape[dim] if dim >= 0 else 1
            if count == 1:
                continue
            shared = out.size // count  # query heads that read one key head (grouped-query attention), else 1
            if out.inner % shared:
                return None
            pieces[name] = Slice(dim, out.extent, out.outer, out.inner // shared)
    return cut(call, pieces)
