"""Bounds: the most that CUDA's kernels allocate for themselves, for a card that isn't there to be measured.

Read from torch's sources: what an operator copies before its kernel runs, the buffers that it makes, and the workspaces
that libraries take through torch's allocator. An operator that nothing is known of is held to allocate as much as it
reads and makes. What libraries keep for good (a context, cuBLAS's workspace) is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format
from torch.utils import _pytree as pytree

from fxstream.passes.machine.choices import CONVOLUTIONS, EFFICIENT, FLASH, attention_kernel, convolution_format
from fxstream.passes.machine.cost import REDUCED
from fxstream.passes.operators.axes import Call, rule_of
from fxstream.passes.operators.common import broadcast, source
from fxstream.runtime.norm import scale_tile

aten = torch.ops.aten

Bound = Callable[[Call], int]
_BOUNDS: dict[OpOverload, Bound] = {}

FLOAT, INDEX, ACCUMULATED = 4, 8, 16
"""Bytes of a number in an accumulator, of an index, and of all that a thread accumulates of a variance."""

PROCESSORS, THREADS = 160, 2048
"""At least as many as cards have, and threads on each: few blocks of work are split for all of them."""


def bound_bytes(target: OpOverload, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The most bytes that a call allocates for itself."""
    call = Call(target, tuple(args), kwargs, out)
    bound = _BOUNDS.get(target)
    if bound is not None:
        return bound(call)
    return 0 if _allocates_nothing(call) else held(call.tensors) + held(out, but=call.tensors)


def is_bounded(target: OpOverload, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether more is known of a call's operator than what it reads and makes."""
    return target in _BOUNDS or _allocates_nothing(Call(target, tuple(args), kwargs, out))


def _allocates_nothing(call: Call) -> bool:
    """One kernel that goes by elements, or only fills what it returns."""
    pointwise = torch.Tag.pointwise in call.target.tags or rule_of(call.target) is broadcast
    return pointwise or not call.tensors


def bound(*operators: OpOverload) -> Callable[[Bound], Bound]:
    """Register a function as the bound of operators."""

    def register(function: Bound) -> Bound:
        for operator in operators:
            _BOUNDS[operator] = function
        return function

    return register


def overloads(*packets: str) -> list[OpOverload]:
    """All overloads of operators of ATen."""
    found = [getattr(aten, name) for name in packets if hasattr(aten, name)]
    return [getattr(packet, name) for packet in found for name in packet.overloads()]


def nbytes(value: Any) -> int:
    """Bytes of the elements of all tensors in a value."""
    return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(value) if isinstance(x, Tensor))


def held(value: Any, but: Any = ()) -> int:
    """Bytes of the storages of all tensors in a value, without those of others: what is repeated counts once."""
    given = {x.untyped_storage()._cdata for x in pytree.tree_leaves(but) if isinstance(x, Tensor)}
    storages = [x.untyped_storage() for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    return sum({each._cdata: int(each.nbytes()) for each in storages if each._cdata not in given}.values())


def copied(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> int:
    """Bytes of the copy of a tensor that doesn't lie as its kernel wants it."""
    return 0 if tensor.is_contiguous(memory_format=memory_format) else nbytes(tensor)


@bound(
    *overloads(
        "cat",
        "concat",
        "concatenate",
        "stack",
        "clone",
        "contiguous",
        "_to_copy",
        "copy",
        "_unsafe_view",
        "repeat",
        "where",
        "embedding",
    ),
    *overloads("repeat_interleave", "index_select", "gather", "tril", "triu", "fill", "lift_fresh_copy", "expand_copy"),
    *overloads("constant_pad_nd", "flip", "roll", "index", "select_scatter", "slice_scatter", "pixel_shuffle"),
    *overloads("pixel_unshuffle", "scatter", "one_hot", "arange", "ones", "zeros", "full", "empty", "scalar_tensor"),
    *overloads("linspace", "eye", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "glu", "tile"),
    *overloads("ones_like", "zeros_like", "full_like", "empty_like", "alias", "unbind_copy", "split_with_sizes_copy"),
    *overloads(
        "meshgrid",
        "broadcast_tensors",
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randint",
        "bernoulli",
        "normal_functional",
        "normal_",
    ),
)
def nothing(call: Call) -> int:
    return 0


@bound(
    *overloads("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d"),
    *overloads("_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *overloads("upsample_linear1d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *overloads("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *overloads("adaptive_avg_pool3d", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *overloads("replication_pad1d", "replication_pad2d", "replication_pad3d", "softmax", "_softmax", "log_softmax"),
    *overloads("_log_softmax", "_safe_softmax", "channel_shuffle", "grid_sampler_2d", "grid_sampler_3d"),
)
def dense(call: Call) -> int:
    """A copy of what is neither contiguous nor channels last."""
    input = source(call)
    return copied(input, suggest_memory_format(input))


@bound(*overloads("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d", "fractional_max_pool2d"))
def pooled(call: Call) -> int:
    """An index for each element, which nobody asked for."""
    out = call.out[0] if isinstance(call.out, (list, tuple)) else call.out
    return dense(call) + INDEX * out.numel()


@bound(
    *overloads("sum", "mean", "var", "var_mean", "std", "amax", "amin", "aminmax", "prod", "any", "all", "argmax"),
    *overloads("argmin", "logsumexp", "linalg_vector_norm", "norm", "max", "min"),
)
def reduced(call: Call) -> int:
    """What blocks that reduce to the same element leave for the last of them: no more than each thread holds."""
    return min(nbytes(source(call)), PROCESSORS * THREADS * ACCUMULATED)


@bound(*overloads("group_norm", "native_group_norm", "instance_norm"))
def group_norm(call: Call) -> int:
    """A contiguous copy of what is not, two moments a group and two factors a channel of each sample."""
    input = call.arguments["input"]
    return copied(input) + 4 * FLOAT * input.shape[0] * input.shape[1]


@bound(*overloads("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"))
def layer_norm(call: Call) -> int:
    """A contiguous copy of what is not, and two moments a row."""
    input, shape = call.arguments["input"], call.arguments["normalized_shape"]
    return copied(input) + 2 * FLOAT * (input.numel() // max(prod(shape), 1))


@bound(
    *overloads("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "native_batch_norm")
)
def batch_norm(call: Call) -> int:
    return dense(call) + 4 * FLOAT * source(call).shape[1]


@bound(torch.ops.fxstream.group_moments.default)
def group_moments(call: Call) -> int:
    return reduced(call)


@bound(torch.ops.fxstream.group_statistics.default)
def group_statistics(call: Call) -> int:
    """The moments in float64, and what the mean and the squares make of them."""
    return 4 * nbytes(source(call))


@bound(torch.ops.fxstream.group_scale.default)
def group_scale(call: Call) -> int:
    """Some values a channel of each sample, and a tile as float32 where there is a weight an element."""
    input, weight = call.arguments["input"], call.arguments["weight"]
    tile = FLOAT * scale_tile(input) if weight is not None and weight.dim() > 1 and input.dtype in REDUCED else 0
    return tile + 6 * FLOAT * input.shape[0] * input.shape[1]


@bound(*CONVOLUTIONS)
def convolution(call: Call) -> int:
    """cuDNN's copies of input, weight and output with channels last, which its kernels for tensor cores work on.

    None where the tensors lie so; one that lies neither way is copied first. Where "same" pads one side more than the
    other, or a transposed kernel works on gradients, that is within what is counted.
    """
    input, weight = call.arguments["input"], call.arguments["weight"]
    layout = convolution_format(input, weight)
    if layout != torch.contiguous_format:
        return copied(input, layout) + copied(weight, layout)
    if _falls_back(input, weight):
        columns = prod(weight.shape[1:]) * prod(call.out.shape[2:]) * input.element_size()
        return copied(input) + columns
    return copied(input) + nbytes(input) + nbytes(weight) + nbytes(call.out)


def _falls_back(input: Tensor, weight: Tensor) -> bool:
    """Whether torch leaves a video's convolution to its own kernel, as with cuDNN 9.8 to 9.14 of reduced types."""
    version = torch.backends.cudnn.version() or 0
    return 90800 <= version < 91500 and weight.dim() == 5 and input.dtype in REDUCED and prod(weight.shape[2:]) > 1


@bound(
    *(aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default),
    *(aten.matmul.default, aten.einsum.default),
)
def product(call: Call) -> int:
    """Copies of operands that no BLAS reads as they lie, or that are repeated over others' batches."""
    given = call.arguments
    if call.target is aten.linear.default:
        return 0 if _folds(given["input"], 1) else nbytes(given["input"])
    bias = given["self"] if call.target in (aten.addmm.default, aten.baddbmm.default) else None
    batch, total = call.shape[:-2], 0
    for tensor in (each for each in call.tensors if each is not bias):
        if call.target is aten.matmul.default and tensor.dim() > 2 and tensor.shape[:-2] != batch:
            total += prod(batch) * prod(tensor.shape[-2:]) * tensor.element_size()
        elif tensor.dim() > 1 and not (1 in tensor.stride()[-2:] and _folds(tensor, 2)):
            total += nbytes(tensor)
    return total


def _folds(tensor: Tensor, kept: int) -> bool:
    """Whether all dimensions but the last ``kept`` go into one without a copy."""
    sizes = [each for each in zip(tensor.shape[:-kept], tensor.stride()[:-kept], strict=True) if each[0] > 1]
    return all(stride == n * step for (_, stride), (n, step) in pairwise(sizes))


@bound(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> int:
    """Of a fused kernel, accumulators in float32 and a mask as numbers; else the scores, more than once."""
    given = call.arguments
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    kernel = attention_kernel(query, key, value, mask, given["dropout_p"], given["is_causal"])
    rows, size = prod(query.shape[:-1]), value.shape[-1]
    if kernel == FLASH:
        parts = rows + 64 * query.shape[0] * query.shape[1]  # blocks of 64 queries of each head
        split = 2 * PROCESSORS * 64 if parts < 2 * PROCESSORS * 64 else 0
        padded = sum(map(nbytes, (query, key, value))) + nbytes(call.out) if size % 8 else 0
        return FLOAT * (rows + split * (size + 1)) + padded
    numbers = mask.numel() * query.element_size() if mask is not None and mask.dtype == torch.bool else 0
    if mask is not None and mask.shape[-1] % 16:
        numbers += (mask.numel() // mask.shape[-1]) * (mask.shape[-1] + 16) * query.element_size()
    if kernel == EFFICIENT:
        accumulated = FLOAT * rows * size if size > 128 and query.dtype in REDUCED else 0
        return numbers + accumulated
    scores = FLOAT * rows * key.shape[-2]
    return numbers + 3 * scores + FLOAT * (query.numel() + 2 * key.numel() + 2 * value.numel() + rows * size)


@bound(
    *overloads("cumsum", "cumprod", "sort", "topk", "argsort", "nonzero", "unique_dim", "masked_select", "index_put")
)
def ordered(call: Call) -> int:
    """What is sorted or counted, with an index for each element, twice."""
    return 2 * (nbytes(call.tensors) + nbytes(call.out) + INDEX * source(call).numel())


@bound(*overloads("_fft_r2c", "_fft_c2r", "_fft_c2c"))
def transformed(call: Call) -> int:
    """cuFFT's workspace, and copies of what it reads and makes."""
    return 2 * (nbytes(call.tensors) + nbytes(call.out))
