"""Joins, reductions, indexing, padding and creation: every dimension that they do not mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fxstream.passes.operators.axes import Call, Cut, Slice, Span, rule
from fxstream.passes.operators.common import aligned, cut, dims, haloed, independent, lead, source, trailing
from fxstream.passes.operators.views import removed
from fxstream.runtime import lookup as _registered  # noqa: F401  (registers the operator)

aten = torch.ops.aten


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(call: Call, out: Slice) -> Cut | None:
    """Along its own dimension, where every tensor holds whole blocks of the axis."""
    tensors = call.arguments["tensors"]
    if any(tensor.dim() != len(call.shape) for tensor in tensors):
        return None
    if out.dim != call.arguments["dim"] % len(call.shape):
        return cut(call, {"tensors": [out] * len(tensors)})
    block = out.extent * out.inner
    sizes = [tensor.shape[out.dim] for tensor in tensors]
    if any(size % block for size in sizes):
        return None
    pieces = [Slice(out.dim, out.extent, size // block, out.inner) if size else None for size in sizes]
    return cut(call, {"tensors": pieces})


@rule(aten.stack.default)
def stack(call: Call, out: Slice) -> Cut | None:
    new, count = call.arguments["dim"] % len(call.shape), len(call.tensors)
    return None if out.dim == new else cut(call, {"tensors": [out.at(out.dim - (out.dim > new))] * count})


@rule(aten.glu.default)
def glu(call: Call, out: Slice) -> Cut | None:
    """The first half times the sigmoid of the second: along its own dimension, a slice of each."""
    own = out.dim == call.arguments["dim"] % len(call.shape)
    return lead(call, Slice(out.dim, out.extent, 2 * out.outer, out.inner) if own else out)


@rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.prod.dim_int,
    aten.amax.default,
    aten.amin.default,
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.any.dim,
    aten.all.dim,
    aten.var.dim,
    aten.var.correction,
    aten.std.dim,
    aten.std.correction,
    aten.var_mean.dim,
    aten.var_mean.correction,
    aten.std_mean.dim,
    aten.std_mean.correction,
    aten.nansum.default,
    aten.nanmean.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.kthvalue.default,
    aten.aminmax.default,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
)
def reduction(call: Call, out: Slice) -> Cut | None:
    """Every dimension that is not reduced."""
    reduced = dims(call.arguments["dim"], source(call).dim())
    if not call.arguments["keepdim"]:
        return removed(call, out, reduced)
    return None if out.dim in reduced else lead(call, out)


independent(
    aten.cumsum.default,
    aten.cumprod.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.logcumsumexp.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.argsort.stable,
    aten.topk.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    but=lambda call: [call.arguments["dim"]],
)
independent(aten.flip.default, aten.rot90.default, but=lambda call: call.arguments["dims"])
independent(aten.channel_shuffle.default, but=lambda call: [1])
independent(aten.roll.default, but=lambda call: call.arguments["dims"] or range(len(call.shape)))
independent(aten.tril.default, aten.triu.default, but=trailing(2))


@rule(
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)
def pad(call: Call, out: Slice) -> Cut | None:
    """Steps before and after those of the input: constant, or made of the steps next to the border."""
    name = "pad" if "pad" in call.arguments else "padding"
    widths, entry = call.arguments[name], 2 * (len(call.shape) - 1 - out.dim)
    before, after = widths[entry : entry + 2] or (0, 0)
    if before == after == 0:
        return lead(call, out)
    size, mirrored = source(call).shape[out.dim], "reflect" in (call.arguments.get("mode") or str(call.target))
    if call.arguments.get("mode") == "circular":
        return None

    def missing(part: Span) -> tuple[int, int]:
        return max(0, before - part[0]), max(0, part[1] - size - before)

    def reads(step: int) -> tuple[int, int]:
        return step - before, step - before

    def place(part: Span, window: Span, clipped: bool) -> tuple[Mapping[str, Any], int]:
        first = max(0, window[0] + before - part[0])
        last = max(0, part[1] - window[1] - before)
        return {name: [*widths[:entry], first, last, *widths[entry + 2 :]]}, window[0] + before - first

    found = haloed(call, out, reads, 1, place)
    if found is None or found.halo is None or not mirrored:
        return found

    def window(part: Span) -> Span:
        """What is mirrored lies inside the border, as far as the part lies outside."""
        low, high = found.halo.window(part)
        first, last = missing(part)
        return min(low, size - 1 - last) if last else low, max(high, first + 1) if first else high

    return replace(found, halo=replace(found.halo, window=window))


@rule(aten.index_select.default)
def index_select(call: Call, out: Slice) -> Cut:
    own = out.dim == call.arguments["dim"] % len(call.shape)
    return cut(call, {"index": out.at(0)} if own else {"self": out})


@rule(aten.index.Tensor)
def index(call: Call, out: Slice) -> Cut | None:
    """Positions instead of dimensions that follow each other; their own dimensions stand there in the output."""
    given = [entry is not None for entry in call.arguments["indices"]]
    tensors = [entry for entry in call.arguments["indices"] if entry is not None]
    first, rank = given.index(True), max(entry.dim() for entry in tensors)
    if not all(given[first : first + len(tensors)]) or any(entry.dtype == torch.bool for entry in tensors):
        return None
    if first <= out.dim < first + rank:
        return cut(call, {"indices": [aligned(entry, rank, out.at(out.dim - first)) for entry in tensors]})
    return lead(call, out if out.dim < first else out.at(out.dim - rank + len(tensors)))


@rule(aten.embedding.default)
def embedding(call: Call, out: Slice) -> Cut:
    feature = out.dim == len(call.shape) - 1
    return cut(call, {"weight": out.at(1)} if feature else {"indices": out})


@rule(torch.ops.fxstream.lookup.default)
def rows_at_home(call: Call, out: Slice) -> Cut | None:
    """A table at home is read by whole rows."""
    return None if out.dim == len(call.shape) - 1 else cut(call, {"indices": out})


@rule(aten.gather.default)
def gather(call: Call, out: Slice) -> Cut | None:
    if out.dim == call.arguments["dim"] % len(call.shape):
        return cut(call, {"index": out})
    same = source(call).shape[out.dim] == out.size
    return cut(call, {"self": out, "index": out}) if same else None


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(call: Call, out: Slice) -> Cut | None:
    """Every other dimension, where all tensors have all of it."""
    whole = all(tensor.dim() and tensor.shape[out.dim] == out.size for tensor in call.tensors)
    own = out.dim == call.arguments["dim"] % len(call.shape)
    return cut(call, dict.fromkeys(("self", "index", "src"), out)) if whole and not own else None


@rule(aten.index_add.default, aten.index_copy.default)
def index_write(call: Call, out: Slice) -> Cut | None:
    own = out.dim == call.arguments["dim"] % len(call.shape)
    return None if own else cut(call, {"self": out, "source": out})


@rule(aten.slice_scatter.default)
def slice_scatter(call: Call, out: Slice) -> Cut | None:
    own = out.dim == call.arguments["dim"] % len(call.shape)
    return None if own else cut(call, {"self": out, "src": out})


@rule(aten.select_scatter.default)
def select_scatter(call: Call, out: Slice) -> Cut | None:
    own = call.arguments["dim"] % len(call.shape)
    return None if out.dim == own else cut(call, {"self": out, "src": out.at(out.dim - (out.dim > own))})


@rule(
    aten.empty.memory_format,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
def create(call: Call, out: Slice) -> Cut:
    return cut(call, {}, lambda length: {"size": out.resized(call.shape, length)})
