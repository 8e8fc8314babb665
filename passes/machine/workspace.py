"""Workspaces: memory that an operator's kernel allocates and frees again before it returns.

Each entry was found by holding predictions against the allocator's events, operator by operator: the workspace is the
peak inside the operator less the bytes of its output. Copies, reorders and column buffers follow the kernels' code and
are exact. The scratchpads of oneDNN's convolutions and matrix products in reduced types come from its blocking
heuristics: those are fits, measured on an AVX-512 machine with AMX for bfloat16 and none for float16 (2 MiB of L2 a
core, torch 2.13, oneDNN 3.12, one and two threads). With AMX a fit is off by up to a thread's window of the input or
block of the weight, and by half of the float32 partial sums where K is 2048 or more. An operator without an entry has
none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

from fxstream.runtime.norm import channels_last, moments_tile, scale_tile

aten = torch.ops.aten

Workspace = Callable[..., int]

_ON_CPU: dict[OpOverload, Workspace] = {}
_ANYWHERE: dict[OpOverload, Workspace] = {}

FLOAT = 4  # bytes of the type that reduced types accumulate in
REDUCED = (torch.bfloat16, torch.float16)


def workspace(*targets: OpOverload, anywhere: bool = False) -> Callable[[Workspace], Workspace]:
    """Register a function as the workspace of operators: called with the output's fake value, then the arguments.

    It holds on the CPU alone, or ``anywhere`` if what it counts is done before the operator reaches a device's kernel.
    """

    def register(function: Workspace) -> Workspace:
        for target in targets:
            (_ANYWHERE if anywhere else _ON_CPU)[target] = function
        return function

    return register


def workspace_bytes(node: fx.Node) -> int:
    """Bytes that the kernel of ``node`` allocates for itself, from the node's fake values."""
    if not isinstance(node.target, OpOverload):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return call_workspace_bytes(node.target, node.meta["val"], args, kwargs)


def has_workspace(target: Any) -> bool:
    """Whether an operator has an entry, for some device."""
    return target in _ANYWHERE or target in _ON_CPU


def call_workspace_bytes(target: OpOverload, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes that the kernel of a call allocates for itself, from the call's fake values."""
    if not isinstance(out, Tensor):
        return 0
    function = _ANYWHERE.get(target)
    if function is None and out.device.type == "cpu":
        function = _ON_CPU.get(target) or (promotion if torch.Tag.pointwise in target.tags else None)
    return 0 if function is None else function(out, *args, **kwargs)


# What tensors and machines are like


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


def _each(values: Any, count: int) -> list[int]:
    """A convolution's parameter for each of its dimensions: given as one for all, or one for each."""
    values = list(values) if isinstance(values, Sequence) else [values]
    return values * count if len(values) == 1 else values


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim in (4, 5) and suggest_memory_format(tensor) in (torch.channels_last, torch.channels_last_3d)


def _copy(tensor: Tensor) -> int:
    """Bytes of a copy to contiguous memory, 0 if it is."""
    return 0 if tensor.is_contiguous() else _bytes(tensor)


def _image_copy(tensor: Tensor) -> int:
    """Bytes of a copy to contiguous memory, in either order of channels; 0 if it is."""
    dense = _channels_last(tensor) and tensor.is_contiguous(memory_format=suggest_memory_format(tensor))
    return 0 if dense else _copy(tensor)


def _permuted(tensor: Tensor) -> bool:
    """Whether the dimensions lie in another order in memory, as pointwise results of them do then."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return strides != sorted(strides, reverse=True)


def _flat_copy(tensor: Tensor, keep: int) -> int:
    """Bytes of a copy that flattens all but the last ``keep`` dimensions, 0 if a view does."""
    leading = [(size, stride) for size, stride in zip(tensor.shape[:-keep], tensor.stride(), strict=False) if size != 1]
    flat = all(a[1] == b[1] * b[0] for a, b in pairwise(leading))
    return 0 if flat else _bytes(tensor)


@cache
def _amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


@cache
def _in_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a reduced type on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


# Pointwise operators and reductions


def promotion(out: Tensor, *args: Any, **kwargs: Any) -> int:
    """Pointwise operators on the CPU convert each tensor that is not of the common type."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim and a.dtype != torch.bool]
    if all(tensor.dtype == out.dtype for tensor in tensors):
        return 0
    common = out.dtype
    if not common.is_floating_point:
        for tensor in tensors:
            common = torch.promote_types(common, tensor.dtype)
    return sum(tensor.numel() * common.itemsize for tensor in tensors if tensor.dtype != common)


@workspace(aten.mean.default, aten.mean.dim)
def mean(out: Tensor, input: Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> int:
    """Reduced types are summed from a float32 copy, into float32."""
    if input.dtype not in REDUCED:
        return 0
    return (input.numel() + (out.numel() if out.dtype in REDUCED else 0)) * FLOAT


@workspace(aten.softmax.int, aten._softmax.default)
def softmax(out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> int:
    """A contiguous copy of the input; where the type of the result differs, converted first, in the input's order."""
    if input.dtype != out.dtype:
        return _bytes(out) * (2 if _permuted(input) else 1)
    return _copy(input)


@workspace(aten.pad.default)
def pad(out: Tensor, input: Tensor, pads: list[int], mode: str = "constant", value: float | None = None) -> int:
    """What repeats the border's values reads a contiguous copy of the input."""
    return _image_copy(input) if mode in ("reflect", "replicate") else 0


@workspace(aten.index_select.default)
def index_select(out: Tensor, input: Tensor, *args: Any) -> int:
    """A contiguous copy of the input."""
    return _copy(input)


# Norms


@workspace(aten.group_norm.default, anywhere=True)
def group_norm(out: Tensor, input: Tensor, groups: int, weight: Tensor | None = None, *args: Any) -> int:
    """A contiguous copy of the input, a mean and a deviation a group; and the sums of channels that lie last."""
    stats = 2 * input.shape[0] * groups * (weight if weight is not None else input).element_size()
    if input.device.type != "cpu":
        return stats + _copy(input)
    sums = 2 * input.shape[0] * input.shape[1] * FLOAT if _channels_last(input) else 0
    return stats + sums + _image_copy(input)


@workspace(torch.ops.fxstream.group_moments.default, anywhere=True)
def group_moments(out: Tensor, input: Tensor, groups: int) -> int:
    """A tile's deviations, before them the tile in the type that it is accumulated in; channels' means and squares."""
    tile = moments_tile(input, groups)
    rows = 2 * tile // input.shape[-1] if channels_last(input) else 0
    return out.element_size() * (tile * (1 if input.dtype == out.dtype else 2) + rows)


@workspace(torch.ops.fxstream.group_statistics.default, anywhere=True)
def group_statistics(out: Tensor, moments: Tensor, count: int, eps: float) -> int:
    """The moments in float64, and the deviations of the means."""
    return 12 * moments.numel() + 4 * out.numel()


@workspace(torch.ops.fxstream.group_scale.default, anywhere=True)
def group_scale(out: Tensor, input: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    """In the statistics' type a mean and a scale a channel, and the bias and tiles that are of another."""
    channels = 2 * input.shape[0] * input.shape[1]
    if weight is not None and weight.dim() == 1:
        channels += input.shape[0] * input.shape[1]
    if bias is not None and bias.dim() == 1 and bias.dtype != statistics.dtype:
        channels += bias.numel()
    each = [tensor for tensor in (weight, bias) if tensor is not None and tensor.dim() > 1]
    if input.dtype != statistics.dtype:
        channels += scale_tile(input)
    if any(tensor.dtype != statistics.dtype for tensor in each):
        channels += scale_tile(input)
    return channels * statistics.element_size()


@workspace(aten.layer_norm.default, anywhere=True)
def layer_norm(out: Tensor, input: Tensor, shape: list[int], weight: Tensor | None = None, *args: Any) -> int:
    """A contiguous copy of the input, a mean and a deviation a row (float32 ones on a GPU)."""
    item = (weight if weight is not None else input).element_size() if input.device.type == "cpu" else FLOAT
    return 2 * input.numel() // math.prod(shape) * item + _copy(input)


@workspace(aten.rms_norm.default)
def rms_norm(out: Tensor, input: Tensor, shape: list[int], weight: Tensor | None = None, *args: Any) -> int:
    """Runs as its parts, in float32: the squares; the normalized input; that times the weight, or in order."""
    full, row = input.numel() * FLOAT, input.numel() // math.prod(shape) * FLOAT
    values = 2 if weight is None and not _permuted(input) else 3
    if input.dtype in REDUCED:
        scale = 0 if weight is None else weight.numel() * FLOAT
        return max(values * full + row + scale, 2 * full + 2 * row) - _bytes(out)
    return max((values - 1) * full + row, full + 2 * row + 12) - _bytes(out)


# Matrix products


def _gemm(rows: int, k: int, n: int, dtype: torch.dtype, batch: int = 1) -> int:
    """Scratchpad of oneDNN's product in a reduced type: packed blocks a thread, and partial sums over a long K."""
    if not _in_onednn(dtype) or batch * rows * k * n <= 16**3:
        return 0
    threads = torch.get_num_threads()
    if dtype == torch.float16 or not _amx():
        # float32 blocks of both and of the result, or its partial sums where K is cut
        deep = k if k <= 512 else 512 if k < 1024 else 1024
        wide = min(n, 64) if deep == k else n if n <= 640 else min(n // 2, 1024)
        share = rows if batch > 1 else min(rows, max(16, -(-rows // threads)))
        least = -(-share // 256)
        high = next((share // count for count in range(least, 2 * least + 1) if share % count == 0), 256)
        block = 64 * deep + high * (deep + wide + (0 if deep % 512 else 16))
        return 512 + threads * (640 + FLOAT * block) if batch * rows > 1 else 0
    k, n = _up(k, 32), _up(n, 32)
    columns = n if batch * rows >= 1024 and 2 * rows >= min(n, 864) else min(n, 64)
    packed = 2 * threads * min(k * columns, 589824)
    partial = FLOAT * rows * (n if n <= 640 else n // 2) if k >= 2048 and n < 4 * k and rows >= 512 else 0
    return 384 + 4736 * threads + packed + partial


def _blas_copy(matrix: Tensor) -> int:
    """Bytes of a copy that gives one of a matrix's last two dimensions the stride 1, 0 if one has it."""
    return 0 if 1 in matrix.stride()[-2:] else _bytes(matrix)


def _batch_copy(matrix: Tensor) -> int:
    """Bytes of a copy of a batch of matrices for the batched product: reduced types want it dense."""
    if _in_onednn(matrix.dtype):
        return 0 if matrix.mT.is_contiguous() else _copy(matrix)
    return _blas_copy(matrix)


@workspace(aten.mm.default)
def mm(out: Tensor, a: Tensor, b: Tensor) -> int:
    """A copy of a matrix that BLAS can't read in place, and oneDNN's scratchpad."""
    return _blas_copy(a) + _blas_copy(b) + _gemm(a.shape[0], a.shape[1], b.shape[1], a.dtype)


@workspace(aten.addmm.default)
def addmm(out: Tensor, input: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> int:
    """As without the sum, which is written to the output first."""
    return mm(out, a, b)


@workspace(aten.bmm.default)
def bmm(out: Tensor, a: Tensor, b: Tensor) -> int:
    """Dense copies in reduced types, and oneDNN's scratchpad."""
    return _batch_copy(a) + _batch_copy(b) + _gemm(a.shape[1], a.shape[2], b.shape[2], a.dtype, a.shape[0])


@workspace(aten.baddbmm.default)
def baddbmm(out: Tensor, input: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> int:
    """As without the sum, which is written to the output first."""
    return bmm(out, a, b)


@workspace(aten.matmul.default)
def matmul(out: Tensor, a: Tensor, b: Tensor) -> int:
    """Copies that flatten the batch of both; one matrix for a batch is as in linear."""
    if a.ndim > 2 and b.ndim == 2:
        return linear(out, a, b.mT)
    if min(a.ndim, b.ndim) < 2 or max(a.ndim, b.ndim) < 3:
        return 0
    batch = out.numel() // (out.shape[-1] * out.shape[-2])
    copies = [_flat_copy(x, 2) if x.ndim > 3 else _batch_copy(x) for x in (a, b)]
    return sum(copies) + _gemm(a.shape[-2], a.shape[-1], b.shape[-1], a.dtype, batch)


@workspace(aten.linear.default, anywhere=True)
def linear(out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> int:
    """One product of flattened rows, copied if a view can't flatten them. If so and the weight needs no gradient, a
    batch of products instead; in reduced types the weight is then copied for each.
    """
    on_cpu = input.device.type == "cpu"
    n, k = weight.shape
    rows = input.numel() // k
    flatten = _flat_copy(input, 1)
    if not flatten or weight.requires_grad:
        return flatten + (_gemm(rows, k, n, input.dtype) if on_cpu else 0)
    merge = _flat_copy(input, 2)
    if not (on_cpu and _in_onednn(input.dtype)):
        return merge
    batch = math.prod(input.shape[:-2])
    return (merge or _batch_copy(input)) + batch * _bytes(weight) + _gemm(rows // batch, k, n, input.dtype, batch)


# Convolutions


CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@workspace(*CONVOLUTIONS)
def convolution(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> int:
    """oneDNN works on reordered copies: of the input and the weight until it is done, of the output until it is in
    order (twice, in reduced types). Where torch has its own kernel, a buffer of columns.
    """
    kernel = weight.shape[2:]
    stride, padding, dilation = (_each(values, len(kernel)) for values in (stride, padding, dilation))
    last = _channels_last(input) or _channels_last(weight)
    copy = _image_copy(input) if last else _copy(input)
    if last and not weight.is_contiguous(memory_format=[torch.channels_last, torch.channels_last_3d][len(kernel) - 2]):
        copy += _bytes(weight)
    channels, made = input.shape[1], out.shape[1]
    if not _convolves_in_onednn(input, input.shape, kernel, stride, dilation, groups):
        plain = max(kernel) == max(stride) == 1 and not any(padding)
        columns = 0 if plain else channels * math.prod(kernel) * _bytes(out) // made
        return (copy if len(kernel) < 3 else _copy(input)) + columns
    if last or input.dtype in REDUCED:
        scratch = _scratchpad(input, weight, out, stride, padding, groups)
        reordered = _bytes(weight) // made * _up(made, 16)
        if input.dtype == torch.bfloat16 and _amx() and channels > 32 and groups == 1:
            reordered = reordered // channels * _up(channels, 32)
        direct = groups == channels == made and input.dtype == torch.bfloat16
        kept = 0 if last else _bytes(out) * (1 if direct else 2)
        return copy + max(scratch + reordered + (0 if last else _bytes(input)), kept)
    # float32: blocks of 16 channels; few input channels are read as they are
    padded, blocks = (size if groups > 1 else _up(size, 16) for size in (channels, made))
    source = 0 if channels < 16 and groups == 1 else _bytes(input) // channels * padded
    reordered = math.prod(kernel) * blocks * (padded if source else channels) // groups * FLOAT
    result = _bytes(out) // made * blocks
    padded_bias = 128 + blocks * FLOAT if bias is not None and blocks != made else 0
    return copy + max(source + reordered + result - _bytes(out) + padded_bias, result)


@workspace(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(out: Tensor, input: Tensor, weight: Tensor, *args: Any) -> int:
    """Reordered copies as in a convolution; oneDNN's scratchpad is not counted."""
    return _image_copy(input) + max(_bytes(input) + _bytes(weight), 2 * _bytes(out))


def convolves_plainly(target: Any, args: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether a convolution of a part of its input, of that shape, takes the slow kernel that torch has on the CPU."""
    if target not in CONVOLUTIONS or args[0].device.type != "cpu":
        return False
    given: tuple[Any, ...] = (*args, *(None, 1, 0, 1, 1)[len(args) - 2 :])
    input, weight, _, stride, _, dilation, groups = given
    kernel = weight.shape[2:]
    stride, dilation = (_each(values, len(kernel)) for values in (stride, dilation))
    return not _convolves_in_onednn(input, shape, kernel, stride, dilation, groups)


def _convolves_in_onednn(
    input: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Torch's own choice between oneDNN and its plain kernels (`use_mkldnn` of ATen's Convolution.cpp)."""
    if input.dtype in REDUCED:
        return _in_onednn(input.dtype)
    if input.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    height, width = (1, *kernel)[-2:]
    batch = shape[0]
    pays = max(*stride, *dilation, height, width) > 1 or batch >= 16 or torch.get_num_threads() > 1
    return pays and (groups > 1 or min(height, width) > 3 or batch > 1 or math.prod(shape[:4]) > 20480)


def _scratchpad(
    input: Tensor, weight: Tensor, out: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int
) -> int:
    """oneDNN's scratchpad for channels that lie last. With AMX each thread copies a padded window of the input: of
    about 18 rows (measured: 9 to 43), over the frames of a 3-D one about 90 (measured: 29 to 234).
    """
    threads = torch.get_num_threads()
    if groups > 1 and (input.dtype == torch.float32 or weight.shape[1] == 1):
        return 0
    if input.dtype != torch.bfloat16 or not _amx():
        return 4120 * threads + 4096
    kernel = weight.shape[2:]
    if max(kernel) == 1:
        return 12312 * threads + 8192
    channels = _up(weight.shape[1], 32 if weight.shape[1] > 16 else 4) * groups
    if padding[-1] == 0 and weight.shape[1] % 32 == 0 and out.shape[-1] > 50:
        window = 0  # read in place
    else:
        rows = 1
        if len(kernel) > 1:
            rows = stride[-2] * min(2 * out.shape[-2] + 3, 18) if kernel[-2] > 1 else input.shape[-2]
        if len(kernel) > 2 and kernel[0] > 1:
            rows = min(rows * (input.shape[2] + 2 * padding[0]), 90)
        window = rows * channels * (input.shape[-1] + 2 * padding[-1])
    return 16384 + threads * (16408 + 2 * _up(window, 4096))


# Resampling and pooling


@workspace(
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bilinear2d.default,
)
def upsample(out: Tensor, input: Tensor, *args: Any) -> int:
    """Small images are resampled with their channels last: copies of the input and the output."""
    if _channels_last(input):
        return _image_copy(input)
    return _bytes(input) + _bytes(out) if sum(out.shape[-2:]) <= 128 else 0


@workspace(aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default)
def average_pool(out: Tensor, input: Tensor, *args: Any) -> int:
    """A contiguous copy of the input."""
    return _image_copy(input)


@workspace(aten.max_pool2d.default)
def max_pool(out: Tensor, input: Tensor, *args: Any) -> int:
    """A contiguous copy of the input, and the indices of the maxima."""
    return _image_copy(input) + 8 * out.numel()


# Attention


@workspace(aten.scaled_dot_product_attention.default)
def attention(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> int:
    """Flash attention where torch takes it on a CPU, else the scores in full; and a boolean mask as numbers."""
    mask = attn_mask.numel() * query.element_size() if attn_mask is not None and attn_mask.dtype == torch.bool else 0
    flash = (
        query.ndim == 4
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and all(x.stride(-1) == 1 and x.numel() for x in (query, key, value))
        and (attn_mask is None or attn_mask.ndim in (2, 4))
        and dropout_p == 0.0
    )
    return mask + (_flash if flash else _scores)(out, query, key, value, is_causal)


def _flash(out: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> int:
    """The log-sum-exp; a thread's block of scores and of the output; in reduced types a block of scores in their own
    type and, with AMX, the keys and values packed (`cpu_flash_attention` of ATen's FlashAttentionKernel.cpp).
    """
    threads = torch.get_num_threads()
    batch, heads, queries, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    rows = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    columns = min(keys, 512)
    total = batch * heads * queries * FLOAT + threads * FLOAT * rows * (columns + 2 + size)
    if query.dtype not in REDUCED:
        return total
    turns = -(-batch * heads * -(-queries // rows) // threads) * rows * (min(queries, keys) if is_causal else keys)
    packs = (
        query.dtype == torch.bfloat16 and _amx() and min(queries, keys) >= 64 and turns >= 4 * batch * kv_heads * keys
    )
    if not packs:
        return total + 2 * threads * rows * columns
    even, tail = _up(columns, 2), (keys - 1) % columns + 1
    padded = (keys - 1) // columns * even + _up(tail, 2)
    packed = batch * kv_heads * (_up(size, 2) * keys + padded * size)
    odd_query = threads * rows * (size + 1) if size % 2 else 0
    return total + 2 * (threads * rows * even + packed + odd_query + threads * columns * size)


def _scores(out: Tensor, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> int:
    """Attention as its parts, in float32: scaled queries and keys, the scores, their softmax (with a boolean for each),
    the product. Reduced types are converted first and last.
    """
    reduced = query.dtype in REDUCED
    q, k, v = (x.numel() * FLOAT for x in (query, key, value))
    q_flat, k_flat, v_flat = (_flat_copy(x, 2) and x.numel() * FLOAT for x in (query, key, value))
    count = q // FLOAT // query.shape[-1] * key.shape[-2]
    scores = count * FLOAT
    held = q + (q + k + v if reduced else 0) + (query.shape[-2] * key.shape[-2] * FLOAT if is_causal else 0)
    product = k + q_flat + k_flat + scores
    normalize = 2 * scores + count + query.numel() // query.shape[-1]
    apply = scores + out.numel() * FLOAT + max(v_flat, _bytes(out) if reduced else 0) + (2 * count if reduced else 0)
    return held + max(product, normalize, apply) - _bytes(out)
