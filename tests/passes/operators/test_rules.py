"""Every registered rule against the oracle on random calls, and the axes that the passes count on."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._ops import OpOverload

from fxstream.passes.operators import pointwise as family
from fxstream.passes.operators.axes import Slice, backward, forward, registered, with_arguments
from tests.passes.operators.oracle import call_of, check, slices

aten, norm = torch.ops.aten, torch.ops.fxstream
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Sample = Callable[[Random, OpOverload], Arguments]
SAMPLES: dict[OpOverload, Sample] = {}
RULED = [operator for operator in registered() if isinstance(operator, OpOverload)]
REGISTERED = {operator for operator in RULED if operator.namespace in ("aten", "fxstream")}


def sample(*operators: OpOverload) -> Callable[[Sample], Sample]:
    """Register how to draw the arguments of operators."""

    def register(function: Sample) -> Sample:
        SAMPLES.update(dict.fromkeys(operators, function))
        return function

    return register


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_every_rule_is_drawn() -> None:
    assert set(SAMPLES) == REGISTERED


@pytest.mark.parametrize("operator", sorted(REGISTERED, key=str), ids=str)
def test_slices_equal_whole(operator: OpOverload) -> None:
    accepted = 0

    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(st.randoms(use_true_random=False))
    def holds(random: Random) -> None:
        nonlocal accepted
        args, kwargs = SAMPLES[operator](random, operator)
        call = call_of(operator, *args, **kwargs)
        partitions = Random(random.randrange(2**16))
        accepted += sum(check(call, out, partitions) is not None for out in slices(call.shape))

    holds()
    assert accepted


# Drawing arguments


def flag(random: Random) -> bool:
    return random.choice((False, True))


def shape(random: Random, low: int = 1, high: int = 4) -> list[int]:
    return [random.choice((4, 6, 2, 3, 1)) for _ in range(random.randint(low, high))]


def tensor(random: Random, *sizes: int) -> torch.Tensor:
    """Random numbers, at times in reversed layout."""
    if flag(random):
        return torch.randn(sizes, dtype=torch.float64)
    return torch.randn(sizes[::-1], dtype=torch.float64).permute(list(range(len(sizes)))[::-1])


def dim_of(random: Random, rank: int) -> int:
    return random.randrange(-rank, rank)


def dims_of(random: Random, rank: int) -> list[int]:
    return sorted(random.sample(range(rank), random.randint(0, rank)))


def maybe(random: Random, value: Any) -> Any:
    return value if flag(random) else None


def broadcastable(random: Random, sizes: list[int]) -> list[int]:
    """A shape that broadcasts to ``sizes``."""
    return [size if random.randrange(4) else 1 for size in sizes][random.choice((0, 0, 0, 1)) :]


def factors(random: Random, size: int) -> list[int]:
    """Some factors whose product is ``size``, ones among them."""
    found = []
    while size > 1:
        found.append(random.choice([n for n in range(2, size + 1) if size % n == 0]))
        size //= found[-1]
    if flag(random) or not found:
        found.insert(random.randint(0, len(found)), 1)
    return found


# Pointwise, by schema


def pointwise(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    bits = operator._schema.name.startswith(("aten::bitwise", "aten::__"))
    for argument in operator._schema.arguments:
        kind = str(argument.type)
        if argument.name in ("condition", "mask"):
            args.append(torch.rand(broadcastable(random, sizes)) > 0.5)
        elif kind in ("Tensor", "Optional[Tensor]"):
            drawn = tensor(random, *broadcastable(random, sizes))
            args.append((drawn * 9).to(torch.int64) if bits else drawn)
        elif kind in ("number", "Optional[number]") and not argument.kwarg_only:
            args.append(3 if bits else 0.5 + len(args))
        elif argument.name == "rounding_mode":
            kwargs["rounding_mode"] = random.choice(("floor", "trunc", None))
        elif argument.name == "decimals":
            kwargs["decimals"] = 1
        elif not argument.kwarg_only:
            args.append(argument.default_value)
    return tuple(args), kwargs


POINTWISE = family.ARITHMETIC + family.ACTIVATIONS + family.LOGIC
sample(*(operator for name in POINTWISE.split() for operator in family.overloads(getattr(aten, name))))(pointwise)


@sample(aten.masked_fill.Tensor)
def masked_fill(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    return (tensor(random, *sizes), torch.rand(broadcastable(random, sizes)) > 0.5, tensor(random)), {}


@sample(aten.fill.Tensor)
def fill(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)), tensor(random)), {}


@sample(aten.copy.default)
def copy(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    return (tensor(random, *sizes), tensor(random, *broadcastable(random, sizes))), {}


@sample(aten.type_as.default)
def type_as(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    return (tensor(random, *sizes), torch.ones(sizes if flag(random) else shape(random))), {}


@sample(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
)
def copied(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)),), {}


@sample(aten._to_copy.default, aten.to.dtype_layout)
def to_copy(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)),), {"dtype": random.choice((torch.float32, torch.float64))}


@sample(aten.to.dtype)
def to_dtype(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)), random.choice((torch.float32, torch.float64))), {}


@sample(aten.to.device)
def to_device(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)), torch.device("cpu"), torch.float32), {}


@sample(aten.full_like.default)
def full_like(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)), 2.5), {}


@sample(aten.dropout.default)
def dropout(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)), 0.5, False), {}


# Views


@sample(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(random: Random, operator: OpOverload) -> Arguments:
    """A reshape that splits and merges dimensions at random."""
    drawn = tensor(random, *shape(random))
    return (drawn, factors(random, drawn.numel())), {}


@sample(aten.flatten.using_ints)
def flatten(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    first = random.randrange(drawn.dim())
    return (drawn, first, random.choice((-1, random.randrange(first, drawn.dim())))), {}


@sample(aten.unflatten.int)
def unflatten(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    return (drawn, dim, factors(random, drawn.shape[dim])), {}


@sample(aten.permute.default)
def permute(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    order = random.sample(range(drawn.dim()), drawn.dim())
    return (drawn, [dim - drawn.dim() if flag(random) else dim for dim in order]), {}


@sample(aten.transpose.int)
def transpose(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    return (drawn, dim_of(random, drawn.dim()), dim_of(random, drawn.dim())), {}


@sample(aten.t.default)
def t(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random, 1, 2)),), {}


@sample(aten.unsqueeze.default)
def unsqueeze(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 1, 3))
    return (drawn, dim_of(random, drawn.dim() + 1)), {}


@sample(aten.squeeze.dim)
def squeeze_dim(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    return (drawn, dim_of(random, drawn.dim())), {}


@sample(aten.squeeze.dims)
def squeeze_dims(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    return (drawn, dims_of(random, drawn.dim())), {}


@sample(aten.select.int)
def select(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    dim = dim_of(random, drawn.dim())
    return (drawn, dim, dim_of(random, drawn.shape[dim])), {}


@sample(aten.unbind.int)
def unbind(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    return (drawn, dim_of(random, drawn.dim())), {}


@sample(aten.slice.Tensor)
def slice_(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    size = drawn.shape[dim]
    start = random.randrange(-size, size)
    end = random.choice((None, 2**63 - 1, random.randint(start % size + 1, size), -1))
    return (drawn, dim, maybe(random, start), end, random.choice((1, 1, 2, 3)))[: random.randint(1, 5)], {}


@sample(aten.split.Tensor)
def split(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    return (drawn, random.randint(1, drawn.shape[dim]), dim), {}


@sample(aten.split_with_sizes.default)
def split_with_sizes(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    dim = dim_of(random, len(sizes))
    widths = [sizes[dim]] * 2 if flag(random) else [2, 1, 3]
    sizes[dim] = sum(widths)
    return (tensor(random, *sizes), widths, dim), {}


@sample(aten.chunk.default)
def chunk(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    return (drawn, random.randint(1, 5), dim_of(random, drawn.dim())), {}


@sample(aten.view.dtype)
def view_dtype(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    return (torch.randn(*sizes[:-1], 4), random.choice((torch.int16, torch.int32, torch.int64))), {}


@sample(aten.view_as_real.default)
def view_as_real(random: Random, operator: OpOverload) -> Arguments:
    return (torch.randn(shape(random), dtype=torch.complex128),), {}


@sample(aten.view_as_complex.default)
def view_as_complex(random: Random, operator: OpOverload) -> Arguments:
    return (torch.randn(*shape(random, 1, 3), 2, dtype=torch.float64),), {}


@sample(aten.expand.default)
def expand(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    return (tensor(random, *broadcastable(random, sizes)), sizes), {}


@sample(aten.expand_as.default)
def expand_as(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    return (tensor(random, *broadcastable(random, sizes)), tensor(random, *sizes)), {}


@sample(aten.repeat.default)
def repeat(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random, 1, 3)
    return (tensor(random, *sizes), [random.choice((2, 1, 4)) for _ in range(len(sizes) + flag(random))]), {}


@sample(aten.repeat_interleave.self_int)
def repeat_interleave(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim, count = dim_of(random, drawn.dim()), random.choice((2, 1, 4))
    return (drawn, count, dim), {"output_size": maybe(random, drawn.shape[dim] * count)}


# Products and attention


@sample(aten.linear.default)
def linear(random: Random, operator: OpOverload) -> Arguments:
    sizes, features = shape(random), random.choice((4, 6))
    weight, bias = tensor(random, features, sizes[-1]), tensor(random, features)
    return (tensor(random, *sizes), weight, maybe(random, bias)), {}


def whole(random: Random, *sizes: int) -> torch.Tensor:
    """Small whole numbers in float32, whose products of any order are the same."""
    return torch.randint(-4, 5, sizes).float()


@sample(aten._weight_int8pack_mm.default)
def weight_int8pack_mm(random: Random, operator: OpOverload) -> Arguments:
    m, k, n = random.randint(1, 6), random.choice((4, 8)), random.choice((2, 6))
    return (whole(random, m, k), whole(random, n, k).to(torch.int8), whole(random, n)), {}


@sample(aten._weight_int4pack_mm_for_cpu.default)
def weight_int4pack_mm(random: Random, operator: OpOverload) -> Arguments:
    weight = aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (16, 32), dtype=torch.int32), 2)
    return (whole(random, random.randint(2, 6), 32), weight, 32, whole(random, 1, 16, 2)), {}


@sample(aten._int_mm.default)
def int_mm(random: Random, operator: OpOverload) -> Arguments:
    m, k, n = random.randint(1, 6), random.choice((4, 8)), random.choice((2, 6))
    return (whole(random, m, k).to(torch.int8), whole(random, k, n).to(torch.int8)), {}


@sample(aten._scaled_mm.default)
def scaled_mm(random: Random, operator: OpOverload) -> Arguments:
    m, k, n = random.randint(1, 6), random.choice((16, 32)), random.choice((16, 32))
    one, other = (whole(random, size, k).to(torch.float8_e4m3fn) for size in (m, n))
    each = flag(random)
    scales = (whole(random, m, 1), whole(random, 1, n)) if each else (torch.tensor(2.0), torch.tensor(0.5))
    return (one, other.t(), *scales), {"out_dtype": torch.float32, "bias": None if each else whole(random, n)}


@sample(aten.mm.default)
def mm(random: Random, operator: OpOverload) -> Arguments:
    m, k, n = shape(random, 3, 3)
    return (tensor(random, m, k), tensor(random, k, n)), {}


@sample(aten.bmm.default)
def bmm(random: Random, operator: OpOverload) -> Arguments:
    b, m, k, n = shape(random, 4, 4)
    return (tensor(random, b, m, k), tensor(random, b, k, n)), {}


@sample(aten.addmm.default)
def addmm(random: Random, operator: OpOverload) -> Arguments:
    args, _ = mm(random, operator)
    sizes = [args[0].shape[0], args[1].shape[1]]
    return (tensor(random, *broadcastable(random, sizes)), *args), {"alpha": 2}


@sample(aten.baddbmm.default)
def baddbmm(random: Random, operator: OpOverload) -> Arguments:
    args, _ = bmm(random, operator)
    sizes = [args[0].shape[0], args[0].shape[1], args[1].shape[2]]
    return (tensor(random, *broadcastable(random, sizes)), *args), {"beta": 2}


@sample(aten.matmul.default)
def matmul(random: Random, operator: OpOverload) -> Arguments:
    *batch, m, k, n = shape(random, 3, 5)
    left = [k] if flag(random) else [*broadcastable(random, batch), m, k]
    right = [k] if flag(random) and len(left) > 1 else [*broadcastable(random, batch), k, n]
    return (tensor(random, *left), tensor(random, *right)), {}


@sample(aten.einsum.default)
def einsum(random: Random, operator: OpOverload) -> Arguments:
    equation = random.choice(
        ("bmk,bnk->bmn", "...mk,kn->...mn", "b...d, d e -> b e ...", "ij,jk", "ii,ij->ij", "hd,bhd->b", "cb,...ba")
    )
    sizes = dict(zip("abcdehijkmn", shape(random, 11, 11), strict=True))
    inner = shape(random, 0, 2)
    operands = []
    for term in equation.replace(" ", "").split("->")[0].split(","):
        before, dots, after = term.partition("...")
        operands.append([sizes[x] for x in before] + inner * bool(dots) + [sizes[x] for x in after])
    return (equation, [tensor(random, *operand) for operand in operands]), {}


@sample(aten.scaled_dot_product_attention.default)
def attention(random: Random, operator: OpOverload) -> Arguments:
    *batch, heads, queries, keys = shape(random, 3, 5)
    features, value_features = random.choice(((4, 4), (4, 4), (4, 6)))
    kwargs: dict[str, Any] = {"scale": maybe(random, 0.3)}
    key_heads = heads
    if flag(random) and batch:
        key_heads = random.choice([n for n in range(1, heads + 1) if heads % n == 0])
        kwargs["enable_gqa"] = True
    mask = None
    if flag(random):
        mask = tensor(random, *broadcastable(random, [*batch, heads, queries])[-4:], keys)
        mask = mask > -1 if flag(random) else mask
        mask = mask if mask.dim() > 1 else None
    elif flag(random):
        kwargs["is_causal"] = True
    query = tensor(random, *batch, heads, queries, features)
    key = tensor(random, *batch, key_heads, keys, features)
    value = tensor(random, *batch, key_heads, keys, value_features)
    return (query, key, value, mask), kwargs


# Norms


@sample(
    aten.softmax.int,
    aten._safe_softmax.default,
    aten.log_softmax.int,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.logcumsumexp.default,
)
def along(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    return (drawn, dim_of(random, drawn.dim())), {}


@sample(aten._softmax.default, aten._log_softmax.default)
def half_softmax(random: Random, operator: OpOverload) -> Arguments:
    args, _ = along(random, operator)
    return (*args, False), {}


@sample(aten.layer_norm.default)
def layer_norm(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random, 2)
    normal = sizes[random.randint(1, len(sizes) - 1) :]
    return (tensor(random, *sizes), normal, *(maybe(random, tensor(random, *normal)) for _ in "wb"), 1e-5), {}


@sample(aten.native_layer_norm.default)
def native_layer_norm(random: Random, operator: OpOverload) -> Arguments:
    return layer_norm(random, operator)


@sample(aten.rms_norm.default, aten._fused_rms_norm.default)
def rms_norm(random: Random, operator: OpOverload) -> Arguments:
    (drawn, normal, weight, _, eps), _ = layer_norm(random, operator)
    return (drawn, normal, weight, eps), {}


@sample(aten.group_norm.default)
def group_norm(random: Random, operator: OpOverload) -> Arguments:
    groups, width = random.choice((2, 4, 6, 1)), random.choice((2, 1, 3))
    sizes = [random.choice((2, 4)), groups * width, *shape(random, 1, 2), 2]
    weight, bias = (maybe(random, tensor(random, groups * width)) for _ in "wb")
    return (tensor(random, *sizes), groups, weight, bias, 1e-5), {}


@sample(aten.batch_norm.default)
def batch_norm(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    weight, bias = (maybe(random, tensor(random, drawn.shape[1])) for _ in "wb")
    mean, var = tensor(random, drawn.shape[1]), tensor(random, drawn.shape[1]).exp()
    return (drawn, weight, bias, mean, var, False, 0.1, 1e-5, False), {}


@sample(norm.group_moments.default, norm.group_statistics.default, norm.group_scale.default)
def split_norm(random: Random, operator: OpOverload) -> Arguments:
    groups, width = random.choice((1, 2, 4)), random.choice((1, 2, 3))
    sizes = [random.choice((1, 2, 5)) for _ in range(random.choice((2, 3)))]
    samples = random.choice((1, 2, 4))
    if operator is norm.group_statistics.default:
        return (tensor(random, 2, samples, groups, *sizes[:-1]).abs(), width * sizes[-1], 1e-5), {}
    drawn = tensor(random, samples, groups * width, *sizes)
    if operator is norm.group_moments.default:
        return (drawn, groups), {}
    affine = drawn.shape[1:] if flag(random) else drawn.shape[1:2]
    weight, bias = (maybe(random, tensor(random, *affine)) for _ in range(2))
    return (drawn, tensor(random, 2, samples, groups), weight, bias), {}


# Convolutions, pooling, upsampling


def rank_of(operator: OpOverload) -> int:
    return next(int(letter) for letter in operator._schema.name if letter.isdigit())


def windows(random: Random, rank: int) -> list[tuple[int, int, int, int]]:
    """Kernel, stride, padding and dilation of each spatial dimension: pointwise, tiling, or overlapping."""
    choices = [(1, 1, 0, 1), (2, 2, 0, 1), (3, 1, 1, 1), (2, 1, 0, 2), (1, 2, 0, 1), (1, 1, 0, 2), (1, 1, 1, 1)]
    choices += [(3, 3, 1, 1), (3, 3, 0, 1)]
    return [random.choice(choices) for _ in range(rank)]


def convolved(random: Random, rank: int, batch: bool) -> tuple[torch.Tensor, list[int], int]:
    """Input, the channel sizes of its weight, and groups."""
    groups, width, features = random.choice((1, 2, 4)), random.choice((1, 2)), random.choice((2, 4, 1))
    space = [random.choice((4, 6)) for _ in range(rank)]
    drawn = tensor(random, *[random.choice((2, 4))] * batch, groups * width, *space)
    return drawn, [groups * features, width], groups


@sample(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv(random: Random, operator: OpOverload) -> Arguments:
    rank = rank_of(operator)
    drawn, channels, groups = convolved(random, rank, batch=flag(random))
    kernel, *settings = (list(column) for column in zip(*windows(random, rank), strict=True))
    bias = maybe(random, tensor(random, channels[0]))
    return (drawn, tensor(random, *channels, *kernel), bias, *settings, groups), {}


@sample(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def conv_padding(random: Random, operator: OpOverload) -> Arguments:
    (drawn, weight, bias, _, _, dilation, groups), _ = conv(random, operator)
    return (drawn, weight, bias, [1], random.choice(("same", "valid")), dilation, groups), {}


@sample(aten.convolution.default)
def convolution(random: Random, operator: OpOverload) -> Arguments:
    if flag(random):
        args, _ = conv_transpose(random, aten.conv_transpose2d.input)
        drawn, weight, bias, stride, padding, output_padding, groups, dilation = args
        return (drawn, weight, bias, stride, padding, dilation, True, output_padding, groups), {}
    drawn, channels, groups = convolved(random, 2, batch=True)
    kernel, *settings = (list(column) for column in zip(*windows(random, 2), strict=True))
    return (drawn, tensor(random, *channels, *kernel), None, *settings, False, [0, 0], groups), {}


@sample(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(random: Random, operator: OpOverload) -> Arguments:
    rank = rank_of(operator)
    drawn, (features, width), groups = convolved(random, rank, batch=True)
    kernel, *settings = (list(column) for column in zip(*windows(random, rank), strict=True))
    weight = tensor(random, groups * width, features // groups, *kernel)
    stride, padding, dilation = settings
    return (drawn, weight, maybe(random, tensor(random, features)), stride, padding, [0] * rank, groups, dilation), {}


@sample(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(random: Random, operator: OpOverload) -> Arguments:
    rank = rank_of(operator)
    kernel, stride, padding = random.choice(((2, [], 0), (1, 1, 0), (3, 1, 1), (2, 2, 0), (3, 2, 0)))
    drawn = tensor(random, *shape(random, 1, 2), *(random.choice((4, 6)) for _ in range(rank)))
    return (drawn, [kernel] * rank, stride and [stride] * rank, [padding], flag(random)), {}


@sample(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
@sample(aten.max_pool2d_with_indices.default)
def max_pool(random: Random, operator: OpOverload) -> Arguments:
    (drawn, kernel, stride, padding, ceil), _ = avg_pool(random, operator)
    return (drawn, kernel, stride, padding, [random.choice((1, 2)) if ceil else 1], ceil), {}


@sample(
    aten.max_pool1d_with_indices.default,
    aten.max_pool3d_with_indices.default,
)
def max_pool_indices(random: Random, operator: OpOverload) -> Arguments:
    return max_pool(random, operator)


@sample(
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
def adaptive(random: Random, operator: OpOverload) -> Arguments:
    rank = rank_of(operator)
    return (tensor(random, *shape(random, 1, 2), *[6] * rank), [random.choice((1, 2, 4)) for _ in range(rank)]), {}


def upsample(random: Random, operator: OpOverload) -> Arguments:
    """An interpolation given its output size or its factors."""
    rank = rank_of(operator)
    names = [argument.name for argument in operator._schema.arguments]
    times = [random.choice((2, 1, 4, 3, 1.5)) for _ in range(rank)]
    drawn = tensor(random, *shape(random, 2, 2), *(random.choice((2, 4, 3)) for _ in range(rank)))
    size = [int(side * factor) for side, factor in zip(drawn.shape[2:], times, strict=True)]
    corners = [flag(random)] * ("align_corners" in names)
    if "scale_factors" not in names:
        return (drawn, size, *corners, *(times if flag(random) else [])), {}
    if flag(random):
        return (drawn, None, *corners, [float(factor) for factor in times]), {}
    return (drawn, size, *corners, None), {}


sample(*(operator for operator in REGISTERED if "upsample" in operator._schema.name))(upsample)


@sample(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random, 0, 2), 4, 2, 4), 2), {}


@sample(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(random: Random, operator: OpOverload) -> Arguments:
    rank = 3 if operator is aten.grid_sampler_3d.default else 2
    samples = random.choice((1, 2, 4))
    drawn, pixels = tensor(random, samples, 2, *[4] * rank), [random.choice((2, 4, 6)) for _ in range(rank)]
    return (drawn, tensor(random, samples, *pixels, rank), random.randrange(2), random.randrange(3), flag(random)), {}


# Joins, reductions, indexing, padding, creation


@sample(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    dim = dim_of(random, len(sizes))
    widths = random.choice(([4, 4], [2, 4, 6], [3, 1], [6], [4, 0, 4]))
    shapes = [[width if i == dim % len(sizes) else size for i, size in enumerate(sizes)] for width in widths]
    return ([tensor(random, *each) for each in shapes], dim), {}


@sample(aten.stack.default)
def stack(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random, 1, 3)
    return ([tensor(random, *sizes) for _ in range(random.choice((2, 4, 1)))], dim_of(random, len(sizes) + 1)), {}


@sample(
    aten._conj.default,
    aten._conj_physical.default,
    aten.resolve_conj.default,
    aten._neg_view.default,
    aten.resolve_neg.default,
)
def conjugate(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    return (torch.complex(tensor(random, *sizes), tensor(random, *sizes)),), {}


@sample(aten.prelu.default)
def prelu(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random, 2)
    return (tensor(random, *sizes), tensor(random, random.choice((1, sizes[1])))), {}


@sample(aten._prelu_kernel.default)
def prelu_kernel(random: Random, operator: OpOverload) -> Arguments:
    (drawn, weight), _ = prelu(random, operator)
    return (drawn, weight.reshape(1, -1, *[1] * (drawn.dim() - 2))), {}


@sample(aten.glu.default)
def glu(random: Random, operator: OpOverload) -> Arguments:
    sizes = shape(random)
    dim = dim_of(random, len(sizes))
    sizes[dim] *= 2
    return (tensor(random, *sizes), dim), {}


@sample(
    aten.prod.dim_int,
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.any.dim,
    aten.all.dim,
)
def reduce_one(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    return (drawn, dim_of(random, drawn.dim()), flag(random)), {}


@sample(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def reduce_some(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    return (drawn, dims_of(random, drawn.dim()), flag(random)), {}


@sample(aten.median.dim, aten.nanmedian.dim, aten.mode.default)
def reduce_to_one(random: Random, operator: OpOverload) -> Arguments:
    return reduce_one(random, operator)


@sample(aten.aminmax.default)
def reduce_to_bounds(random: Random, operator: OpOverload) -> Arguments:
    (drawn, dim, keepdim), _ = reduce_one(random, operator)
    return (drawn,), {"dim": dim, "keepdim": keepdim}


@sample(aten.kthvalue.default)
def reduce_to_kth(random: Random, operator: OpOverload) -> Arguments:
    (drawn, dim, keepdim), _ = reduce_one(random, operator)
    return (drawn, drawn.shape[dim], dim, keepdim), {}


@sample(aten.nansum.default, aten.nanmean.default)
def reduce_numbers(random: Random, operator: OpOverload) -> Arguments:
    (drawn, reduced, keepdim), _ = reduce_some(random, aten.mean.dim)
    return (drawn, reduced, keepdim), {}


@sample(aten.logsumexp.default)
def reduce_exponentials(random: Random, operator: OpOverload) -> Arguments:
    (drawn, reduced, keepdim), _ = reduce_some(random, operator)
    return (drawn, reduced or [0], keepdim), {}


@sample(aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)
def reduce_variance(random: Random, operator: OpOverload) -> Arguments:
    (drawn, reduced, keepdim), _ = reduce_some(random, operator)
    return (drawn, maybe(random, reduced)), {"correction": 0, "keepdim": keepdim}


@sample(aten.var.dim, aten.std.dim, aten.var_mean.dim, aten.std_mean.dim)
def reduce_variance_unbiased(random: Random, operator: OpOverload) -> Arguments:
    (drawn, reduced, keepdim), _ = reduce_some(random, operator)
    return (drawn, reduced, False, keepdim), {}


@sample(aten.linalg_vector_norm.default)
def reduce_norm(random: Random, operator: OpOverload) -> Arguments:
    (drawn, reduced, keepdim), _ = reduce_some(random, operator)
    return (drawn, random.choice((2, 1)), reduced, keepdim), {}


@sample(aten.flip.default)
def flip(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    return (drawn, dims_of(random, drawn.dim())), {}


@sample(aten.rot90.default)
def rot90(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    return (drawn, random.choice((1, 2, -1)), random.sample(range(drawn.dim()), 2)), {}


@sample(aten.channel_shuffle.default)
def channel_shuffle(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, 2, 4, *shape(random, 1, 2)), 2), {}


@sample(
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.argsort.stable,
    aten.topk.default,
)
def ordered(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim, largest = dim_of(random, drawn.dim()), flag(random)
    if operator is aten.topk.default:
        return (drawn, random.randint(1, drawn.shape[dim]), dim, largest), {}
    named = {"stable": True} if operator in (aten.sort.stable, aten.argsort.stable) else {}
    return (drawn,), {**named, "dim": dim, "descending": largest}


@sample(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.index_add.default, aten.index_copy.default)
def index_write(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    where = indices(drawn.shape[dim], 1)
    if operator is aten.index_fill.int_Scalar:
        return (drawn, dim, where, 2.5), {}
    if operator is aten.index_fill.int_Tensor:
        return (drawn, dim, where, torch.tensor(2.5, dtype=drawn.dtype)), {}
    return (drawn, dim, where, tensor(random, *drawn.narrow(dim, 0, 1).shape)), {}


@sample(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    sizes = [random.choice((size, size, max(1, size - 1))) for size in drawn.shape]
    order = torch.randperm(drawn.shape[dim])[: sizes[dim]]
    where = order.reshape([-1 if i == dim % drawn.dim() else 1 for i in range(drawn.dim())]).expand(sizes)
    source = 2.5 if operator is aten.scatter.value else tensor(random, *sizes)
    return (drawn, dim, where, source, *(["amax"] if operator is aten.scatter_reduce.two else [])), {}


@sample(aten.roll.default)
def roll(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    rolled = dims_of(random, drawn.dim())
    return (drawn, [1] * max(1, len(rolled)), rolled), {}


@sample(aten.tril.default, aten.triu.default)
def triangle(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random, 2)), random.choice((0, 1, -1))), {}


def padding(random: Random, rank: int) -> list[int]:
    return [random.choice((0, 0, 1)) for _ in range(2 * rank)]


@sample(aten.constant_pad_nd.default)
def constant_pad(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    return (drawn, padding(random, random.randint(1, drawn.dim())), 1.5), {}


@sample(aten.pad.default)
def pad(random: Random, operator: OpOverload) -> Arguments:
    mode, rank = random.choice(("constant", "reflect", "replicate", "circular")), random.choice((1, 2))
    drawn = tensor(random, *shape(random, 2, 2), *(random.choice((4, 6)) for _ in range(rank)))
    return (drawn, padding(random, rank), mode), {}


@sample(
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)
def border_pad(random: Random, operator: OpOverload) -> Arguments:
    rank = rank_of(operator)
    drawn = tensor(random, *shape(random, 1, 2), *(random.choice((4, 6)) for _ in range(rank)))
    return (drawn, padding(random, rank)), {}


def indices(size: int, *sizes: int) -> torch.Tensor:
    return torch.randint(size, sizes)


@sample(aten.index_select.default)
def index_select(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    return (drawn, dim, indices(drawn.shape[dim], random.choice((4, 6)))), {}


@sample(aten.index.Tensor)
def index(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random, 2))
    first = random.randrange(drawn.dim())
    sizes = shape(random, 1, 2)
    given = [indices(drawn.shape[first], *sizes)]
    if first + 1 < drawn.dim() and flag(random):
        given.append(indices(drawn.shape[first + 1], *random.choice((sizes, sizes[-1:], [1]))))
    return (drawn, [None] * first + given), {}


@sample(aten.embedding.default, torch.ops.fxstream.lookup.default)
def embedding(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, 5, random.choice((4, 6))), indices(5, *shape(random, 0, 3))), {}


@sample(aten.gather.default)
def gather(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    sizes = [random.choice((size, max(1, size - 1))) for size in drawn.shape]
    return (drawn, dim, indices(drawn.shape[dim], *sizes)), {}


@sample(aten.slice_scatter.default)
def slice_scatter(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim, step = dim_of(random, drawn.dim()), random.choice((1, 2))
    source = aten.slice.Tensor(drawn, dim, 0, 2**63 - 1, step)
    return (drawn, tensor(random, *source.shape), dim, 0, 2**63 - 1, step), {}


@sample(aten.meshgrid.indexing)
def meshgrid(random: Random, operator: OpOverload) -> Arguments:
    return ([tensor(random, size) for size in shape(random, 2)],), {"indexing": random.choice(("ij", "xy"))}


@sample(aten.outer.default)
def outer(random: Random, operator: OpOverload) -> Arguments:
    return tuple(tensor(random, size) for size in shape(random, 2, 2)), {}


@sample(aten.select_scatter.default)
def select_scatter(random: Random, operator: OpOverload) -> Arguments:
    drawn = tensor(random, *shape(random))
    dim = dim_of(random, drawn.dim())
    return (drawn, tensor(random, *drawn.select(dim, 0).shape), dim, 0), {}


@sample(aten.empty.memory_format, aten.zeros.default, aten.ones.default)
def create(random: Random, operator: OpOverload) -> Arguments:
    return (shape(random),), {"dtype": torch.float64}


@sample(aten.full.default)
def full(random: Random, operator: OpOverload) -> Arguments:
    return (shape(random), 2.5), {}


@sample(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default)
def create_new(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)), shape(random)), {}


@sample(aten.new_full.default)
def new_full(random: Random, operator: OpOverload) -> Arguments:
    return (tensor(random, *shape(random)), shape(random), 2.5), {}


# The axes that the passes count on


def rand(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, dtype=torch.float64)


ACCEPTED: dict[str, tuple[Any, ...]] = {
    "frames in a merged batch": (aten.view.default, (rand(2, 3, 4, 5), [6, 20]), {}, Slice(0, 3, 2, 1), [Slice(1, 3)]),
    "rows in merged rows and columns": (
        aten.view.default,
        (rand(2, 4, 3, 5), [2, 12, 5]),
        {},
        Slice(1, 4, 1, 3),
        [Slice(1, 4)],
    ),
    "frames out of a merged batch": (
        aten.view.default,
        (rand(6, 20), [2, 3, 4, 5]),
        {},
        Slice(1, 3),
        [Slice(0, 3, 2, 1)],
    ),
    "tokens of a linear": (
        aten.linear.default,
        (rand(2, 6, 4), rand(5, 4), rand(5)),
        {},
        Slice(1, 6),
        [Slice(1, 6), None, None],
    ),
    "features of a linear": (
        aten.linear.default,
        (rand(2, 6, 4), rand(5, 4), rand(5)),
        {},
        Slice(2, 5),
        [None, Slice(0, 5), Slice(0, 5)],
    ),
    "both halves of a chunk": (aten.chunk.default, (rand(2, 8), 2, -1), {}, Slice(1, 4), [Slice(1, 4, 2, 1)]),
    "queries": (
        aten.scaled_dot_product_attention.default,
        (rand(2, 3, 6, 4), rand(2, 3, 5, 4), rand(2, 3, 5, 4), rand(6, 5)),
        {},
        Slice(2, 6),
        [Slice(2, 6), None, None, Slice(0, 6)],
    ),
    "grouped heads": (
        aten.scaled_dot_product_attention.default,
        (rand(2, 6, 5, 4), rand(2, 3, 5, 4), rand(2, 3, 5, 4)),
        {"enable_gqa": True},
        Slice(1, 3, 1, 2),
        [Slice(1, 3, 1, 2), Slice(1, 3), Slice(1, 3)],
    ),
    "heads that share one key head": (
        aten.scaled_dot_product_attention.default,
        (rand(2, 6, 5, 4), rand(2, 1, 5, 4), rand(2, 1, 5, 4)),
        {"enable_gqa": True},
        Slice(1, 6),
        [Slice(1, 6), None, None],
    ),
    "a half by slicing": (aten.slice.Tensor, (rand(2, 8), 1, 4, 8), {}, Slice(1, 2, 1, 2), [Slice(1, 2, 2, 2)]),
    "every second element": (aten.slice.Tensor, (rand(2, 8), 1, 1, 8, 2), {}, Slice(1, 4), [Slice(1, 4, 1, 2)]),
    "groups of a group norm": (
        aten.group_norm.default,
        (rand(2, 8, 3, 3), 4, rand(8), rand(8)),
        {},
        Slice(1, 4, 1, 2),
        [Slice(1, 4, 1, 2), Slice(0, 4, 1, 2), Slice(0, 4, 1, 2)],
    ),
    "rows of a 1x1 convolution": (
        aten.conv2d.default,
        (rand(2, 3, 4, 4), rand(5, 3, 1, 1)),
        {},
        Slice(2, 4),
        [Slice(2, 4), None],
    ),
    "rows of a temporal convolution": (
        aten.conv3d.default,
        (rand(2, 3, 4, 4, 4), rand(5, 3, 3, 1, 1), None, [1, 1, 1], [1, 0, 0]),
        {},
        Slice(3, 4),
        [Slice(3, 4), None],
    ),
    "patches": (
        aten.conv2d.default,
        (rand(2, 3, 8, 8), rand(5, 3, 2, 2), None, [2, 2]),
        {},
        Slice(2, 4),
        [Slice(2, 8), None],
    ),
    "channels of a convolution": (
        aten.conv2d.default,
        (rand(2, 3, 4, 4), rand(6, 3, 3, 3), rand(6), [1, 1], [1, 1]),
        {},
        Slice(1, 6),
        [None, Slice(0, 6), Slice(0, 6)],
    ),
    "rows of a doubling": (
        aten.upsample_nearest2d.vec,
        (rand(2, 3, 4, 4), None, [2.0, 2.0]),
        {},
        Slice(2, 4, 1, 2),
        [Slice(2, 4)],
    ),
    "rows of a 3x3 convolution": (
        aten.conv2d.default,
        (rand(2, 3, 4, 4), rand(5, 3, 3, 3), None, [1, 1], [1, 1]),
        {},
        Slice(2, 4),
        [Slice(2, 4), None],
    ),
    "rows of a padded 1x1 convolution": (
        aten.conv2d.default,
        (rand(2, 3, 4, 4), rand(5, 3, 1, 1), None, [1, 1], [1, 1]),
        {},
        Slice(2, 6),
        [Slice(2, 4), None],
    ),
    "rows of a halving convolution": (
        aten.conv2d.default,
        (rand(2, 3, 9, 4), rand(5, 3, 3, 3), None, [2, 2], [1, 1]),
        {},
        Slice(2, 5),
        [Slice(2, 9), None],
    ),
    "rows of a doubling convolution": (
        aten.conv_transpose2d.input,
        (rand(2, 3, 5, 4), rand(3, 4, 4, 4), None, [2, 2], [1, 1]),
        {},
        Slice(2, 10),
        [Slice(2, 5), None],
    ),
    "windows that padding shifts": (
        aten.conv1d.default,
        (rand(2, 3, 12), rand(4, 3, 3), None, [3], [1]),
        {},
        Slice(2, 4),
        [Slice(2, 12), None],
    ),
    "dilated windows": (
        aten.max_pool1d.default,
        (rand(2, 3, 8), [2], [2], [0], [2], True),
        {},
        Slice(2, 4),
        [Slice(2, 8)],
    ),
    "a slice that cuts blocks": (aten.slice.Tensor, (rand(2, 8), 1, 1, 5), {}, Slice(1, 4), [Slice(1, 8)]),
    "a padded dimension": (aten.constant_pad_nd.default, (rand(2, 3), [1, 0]), {}, Slice(1, 4), [Slice(1, 3)]),
    "a dimension that is mirrored at its border": (
        aten.reflection_pad1d.default,
        (rand(2, 3, 6), [3, 2]),
        {},
        Slice(2, 11),
        [Slice(2, 6)],
    ),
    "frames of a split group norm's moments": (
        norm.group_moments.default,
        (rand(2, 8, 3, 4, 5), 4),
        {},
        Slice(3, 3),
        [Slice(2, 3)],
    ),
    "rows of a split group norm's scale": (
        norm.group_scale.default,
        (rand(2, 8, 3, 4, 5), rand(2, 2, 4), rand(8), rand(8)),
        {},
        Slice(3, 4),
        [Slice(3, 4), None, None, None],
    ),
    "heads of tokens that are picked": (
        aten.index.Tensor,
        (rand(2, 6, 5, 4), [None, None, torch.tensor([0, 3, 4])]),
        {},
        Slice(1, 6),
        [Slice(1, 6), None],
    ),
    "channels of pixels that are picked": (
        aten.index.Tensor,
        (rand(6, 5, 4), [torch.tensor([0, 3, 4]), torch.tensor([1, 1, 0])]),
        {},
        Slice(1, 4),
        [Slice(2, 4), None, None],
    ),
    "tokens that are picked": (
        aten.index.Tensor,
        (rand(2, 5, 4), [None, torch.tensor([0, 3, 4])]),
        {},
        Slice(1, 3),
        [None, Slice(0, 3)],
    ),
    "rows of a split layer norm's scale": (
        norm.group_scale.default,
        (rand(2, 8, 4, 5), rand(2, 2, 1), rand(8, 4, 5), rand(8, 4, 5)),
        {},
        Slice(2, 4),
        [Slice(2, 4), None, Slice(1, 4), Slice(1, 4)],
    ),
    "groups of a split group norm's scale": (
        norm.group_scale.default,
        (rand(2, 8, 3, 4, 5), rand(2, 2, 4), rand(8), None),
        {},
        Slice(1, 4, 1, 2),
        [Slice(1, 4, 1, 2), Slice(2, 4), Slice(0, 4, 1, 2)],
    ),
    "samples repeated for guidance": (aten.repeat.default, (rand(3, 4), [2, 1]), {}, Slice(0, 3, 2), [Slice(0, 3)]),
}

REFUSED: dict[str, tuple[Any, ...]] = {
    "a mask of tokens": (aten.index.Tensor, (rand(6, 4), [torch.ones(6).bool()]), {}, Slice(0, 6)),
    "dimensions apart that are picked": (
        aten.index.Tensor,
        (rand(2, 5, 4), [torch.tensor([0, 1]), None, torch.tensor([0, 1])]),
        {},
        Slice(1, 5),
    ),
    "pixels of a group norm": (aten.group_norm.default, (rand(2, 8, 3, 3), 4), {}, Slice(2, 3)),
    "half groups of a group norm": (aten.group_norm.default, (rand(2, 8, 3, 3), 4), {}, Slice(1, 8)),
    "softmax's own dimension": (aten.softmax.int, (rand(2, 4), -1), {}, Slice(1, 4)),
    "causal queries": (
        aten.scaled_dot_product_attention.default,
        (rand(2, 3, 6, 4), rand(2, 3, 6, 4), rand(2, 3, 6, 4), None, 0.0, True),
        {},
        Slice(2, 6),
    ),
    "half a group of heads": (
        aten.scaled_dot_product_attention.default,
        (rand(2, 6, 5, 4), rand(2, 3, 5, 4), rand(2, 3, 5, 4)),
        {"enable_gqa": True},
        Slice(1, 6),
    ),
    "attention with dropout": (
        aten.scaled_dot_product_attention.default,
        (rand(2, 3, 6, 4), rand(2, 3, 6, 4), rand(2, 3, 6, 4), None, 0.5),
        {},
        Slice(0, 2),
    ),
    "a normalized dimension": (aten.layer_norm.default, (rand(2, 4, 6), [6]), {}, Slice(2, 6)),
    "an axis in no single dimension": (aten.view.default, (rand(2, 3, 4), [6, 4]), {}, Slice(0, 6)),
    "a few behind many": (aten.slice.Tensor, (rand(2, 11), 1, 8, 11), {}, Slice(1, 3)),
    "unequal parts of a split": (aten.split_with_sizes.default, (rand(2, 6), [2, 1, 3], 1), {}, Slice(1, 2)),
    "a dimension that squeeze may drop": (aten.squeeze.dim, (rand(4, 2), 0), {}, Slice(0, 4)),
    "a reversed dimension": (aten.flip.default, (rand(4, 2), [0]), {}, Slice(0, 4)),
    "dropout in training": (aten.dropout.default, (rand(4, 2), 0.5, True), {}, Slice(0, 4)),
    "batch norm in training": (
        aten.batch_norm.default,
        (rand(4, 2), None, None, rand(2), rand(2), True, 0.1, 1e-5, False),
        {},
        Slice(0, 4),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name: str) -> None:
    operator, args, kwargs, out, inputs = ACCEPTED[name]
    cut = check(call_of(operator, *args, **kwargs), out, Random(0))
    assert cut is not None
    assert cut.inputs == tuple(inputs)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    operator, args, kwargs, out = REFUSED[name]
    assert backward(call_of(operator, *args, **kwargs), out) is None


def test_linear_has_no_slice_of_its_contracted_dimension() -> None:
    call = call_of(aten.linear.default, rand(2, 6, 4), rand(4, 4))
    assert forward(call, {0: Slice(2, 4)}) is None
    assert forward(call, {0: Slice(1, 6)}) is not None


def test_replaced_arguments_stand_where_the_schema_has_them():
    x = torch.randn(1, 1, 4, 4)
    args, kwargs = with_arguments(aten.avg_pool2d.default, (x, [2, 2]), {"ceil_mode": True}, {"padding": [1, 0]})
    assert (args[1:], kwargs) == (([2, 2], [], [1, 0]), {"ceil_mode": True})
    args, kwargs = with_arguments(aten.avg_pool2d.default, (x, [2, 2]), {"stride": [1, 1]}, {"padding": [1, 0]})
    assert (args[1:], kwargs) == (([2, 2], [1, 1], [1, 0]), {})
    args, kwargs = with_arguments(aten.sum.default, (x,), {}, {"dtype": torch.float64})
    assert (args, kwargs) == ((x,), {"dtype": torch.float64})
