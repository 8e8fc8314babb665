"""The operators of a split group norm: as exact as the whole one, in any layout, with nothing of the input's size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fxstream.runtime.norm import (
    TILE,
    group_moments,
    group_scale,
    group_statistics,
    moments_at_once,
    moments_tile,
    scale_tile,
    scaled_at_once,
)
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak

GROUPS = 8


def split_norm(x, weight, bias, eps=1e-5):
    moments = group_moments(x, GROUPS)
    count = x.shape[1] // GROUPS * x.shape[-1]
    return group_scale(x, group_statistics(moments, count, eps), weight, bias)


def case(shape, dtype=torch.float32, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + mean
    weight, bias = torch.randn(2, shape[1], generator=generator)
    exact = functional.group_norm(x.to(dtype).double(), GROUPS, weight.to(dtype).double(), bias.to(dtype).double())
    return x.to(dtype), weight.to(dtype), bias.to(dtype), exact


@pytest.mark.parametrize("shape", [(2, 32, 5, 24, 32), (1, 64, 17, 33), (3, 32, 7)], ids=str)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-7), (torch.float64, 1e-14), (torch.bfloat16, 3e-3)])
def test_it_is_the_norm(shape, dtype, bound):
    x, weight, bias, exact = case(shape, dtype)
    result = split_norm(x, weight, bias)
    assert result.dtype == dtype
    assert relative_l2(result, exact) <= bound
    assert relative_l2(result, exact) <= 1.1 * relative_l2(functional.group_norm(x, GROUPS, weight, bias), exact) + 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_means_cancel(dtype):
    """Mean 1e3, deviation 1: no worse than the norm in one piece."""
    x, weight, bias, exact = case((2, 32, 6, 16, 16), dtype, mean=1e3)
    whole = relative_l2(functional.group_norm(x, GROUPS, weight, bias), exact)
    assert relative_l2(split_norm(x, weight, bias), exact) <= whole


def layouts(x):
    yield "contiguous", x
    yield "permuted", x.transpose(0, -1).contiguous().transpose(0, -1)
    yield "channels last", x.contiguous(memory_format=torch.channels_last_3d)
    yield "a window", torch.cat([x, x], -1)[..., : x.shape[-1]]


def test_layouts():
    x, weight, bias, exact = case((2, 32, 3, 6, 10))
    for name, tensor in layouts(x):
        result = split_norm(tensor, weight, bias)
        assert relative_l2(result, exact) <= 1e-7, name
        assert result.stride() == functional.group_norm(tensor, GROUPS, weight, bias).stride(), name


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-7), (torch.float16, 5e-4)])
def test_an_affine_of_each_element(dtype, bound):
    """With a single group: a layer norm over channels and pixels."""
    x = torch.randn(2, 32, 3, 6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, bias = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = functional.layer_norm(x.double(), x.shape[1:], weight.double(), bias.double())
    statistics = group_statistics(group_moments(x, 1), 32 * 10, 1e-5)
    for name, tensor in layouts(x):
        assert relative_l2(group_scale(tensor, statistics, weight, bias), exact) <= bound, name
        assert relative_l2(group_scale(tensor, statistics, weight, None) + bias, exact) <= 2 * bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_of_the_inputs_size_is_made(dtype):
    x, weight, bias, _ = case((1, 32, 8, 128, 128), dtype)
    assert x.numel() > 8 * TILE
    moments = measure_peak(group_moments, x, GROUPS)
    assert moments.peak_bytes <= 2 * moments_tile(x, GROUPS) * 4 + 2 * moments.result.nbytes
    statistics = group_statistics(moments.result, 4 * 128, 1e-5)
    scaled = measure_peak(group_scale, x, statistics, weight, bias)
    assert scaled.peak_bytes <= x.nbytes + scale_tile(x) * 4 + 2**16


def test_fake_tensors_are_as_the_real():
    x, weight, bias, _ = case((2, 32, 3, 6, 10))
    moments = group_moments(x, GROUPS)
    statistics = group_statistics(moments, 40, 1e-5)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(group_moments, (x, GROUPS), test_utils=tests)
    torch.library.opcheck(group_statistics, (moments, 40, 1e-5), test_utils=tests)
    for _, tensor in layouts(x):
        torch.library.opcheck(group_scale, (tensor, statistics, weight, bias), test_utils=tests)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.float16, 5e-4)])
@pytest.mark.parametrize("affine", [True, False])
def test_the_way_of_a_card_computes_the_same(dtype, bound, affine):
    """By kernels that convert as they go, which are run here on the CPU: its own norm is no more exact."""
    x, weight, bias, exact = case((2, 32, 3, 6, 10), dtype)
    weight, bias = (weight, bias) if affine else (None, None)
    exact = exact if affine else functional.group_norm(x.double(), GROUPS)
    values = x.unflatten(1, (GROUPS, -1)).movedim(2, -2)
    found = torch.empty(2, 2, GROUPS, 3, 6, dtype=torch.promote_types(dtype, torch.float32))
    moments_at_once(values, *found)
    expected = group_moments(x, GROUPS)
    assert relative_l2(found, expected) <= 1e-6
    mean, scale = group_statistics(found, 40, 1e-5).repeat_interleave(4, 2)
    scale = scale if weight is None else scale * weight
    result = scaled_at_once(x, mean, scale, bias, torch.empty_like(x))
    assert relative_l2(result, exact) <= bound


def test_the_way_of_a_card_has_moments_of_large_means():
    x, *_ = case((2, 32, 6, 16, 16), torch.float16, mean=1e3)
    found = torch.empty(2, 2, GROUPS, 6, 16)
    moments_at_once(x.unflatten(1, (GROUPS, -1)).movedim(2, -2), *found)
    assert relative_l2(found[1], group_moments(x, GROUPS)[1]) <= 1e-5
