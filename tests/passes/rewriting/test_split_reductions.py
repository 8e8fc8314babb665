"""Split reductions: over several dimensions in two parts, of which the first is cut along rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxstream
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.rewriting.split_reductions import split_reductions
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak

BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ALL = tuple(BOUNDS)
EXACT = (torch.float64, torch.float32)
PIXELS, CLIP = (2, 3), (1, 2, 3)

SPLIT = {
    "mean": (lambda x: x.mean(PIXELS), ALL),
    "mean, kept": (lambda x: x.mean(CLIP, keepdim=True), ALL),
    "mean of all": (lambda x: x.mean(), ALL),
    "mean in float32": (lambda x: x.mean(PIXELS, dtype=torch.float32), ALL),
    "sum": (lambda x: x.sum((1, 2)), EXACT),
    "sum of all": (lambda x: x.sum(), EXACT),
    "sum in float32": (lambda x: x.sum(PIXELS, keepdim=True, dtype=torch.float32), ALL),
    "sum of whole numbers": (lambda x: (x * 9).int().sum(PIXELS), (torch.float32,)),
    "most": (lambda x: x.amax(PIXELS), ALL),
    "least": (lambda x: x.amin((-1, -3), keepdim=True), ALL),
    "length": (lambda x: torch.linalg.vector_norm(x, 2, (1, 2), keepdim=True), ALL),
    "length by sums": (lambda x: torch.linalg.vector_norm(x, 1, PIXELS), ALL),
    "length by the largest": (lambda x: torch.linalg.vector_norm(x, float("inf"), CLIP), ALL),
    "variance": (lambda x: x.var(PIXELS), EXACT),
    "variance, not corrected": (lambda x: x.var(CLIP, unbiased=False, keepdim=True), EXACT),
    "variance, correction of zero": (lambda x: x.var(PIXELS, correction=0), EXACT),
    "pool": (lambda x: functional.adaptive_avg_pool2d(x, 1), ALL),
    "pool of clips": (lambda x: functional.adaptive_avg_pool3d(x, 1), ALL),
}

STAY = {
    "over one dimension": lambda x: x.mean(2),
    "over one that is longer than one": lambda x: x[:1].sum((0, 2)),
    "to several pixels": lambda x: functional.adaptive_avg_pool2d(x, 2),
    "channels last, pooled": lambda x: functional.adaptive_avg_pool2d(x.to(memory_format=torch.channels_last), 1),
    "a count": lambda x: torch.linalg.vector_norm(x, 0, PIXELS),
    "a sum of a reduced type": lambda x: x.half().sum(PIXELS),
    "a variance of a reduced type": lambda x: x.half().var(PIXELS),
    "a large correction": lambda x: x.var(PIXELS, correction=1000),
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def captured(function, x):
    return normalize(capture(Function(function).eval(), (x,)).graph_module)


def layouts(x):
    yield "contiguous", x
    yield "channels last", x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SPLIT)
def test_two_parts_are_the_whole(name):
    function, dtypes = SPLIT[name]
    for dtype in dtypes:
        drawn = torch.randn(2, 6, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 + 3
        for layout, x in layouts(drawn.to(dtype)):
            graph_module = captured(function, x)
            split = split_reductions(graph_module, 1)
            if "pool" in name and layout == "channels last":
                continue
            assert split is not graph_module
            result, expected = split(x)[0], function(x)
            assert result.dtype == expected.dtype and result.stride() == expected.stride()
            assert relative_l2(result, expected) <= BOUNDS.get(expected.dtype, 0), (dtype, layout)
            parts = {node.meta["part"] for node in split.graph.nodes if "origin" in node.meta}
            assert "statistics" in parts and "part" in parts


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name):
    graph_module = captured(STAY[name], torch.randn(2, 6, 20, 24))
    assert split_reductions(graph_module, 1) is graph_module


def test_small_ones_stay():
    x = torch.randn(2, 6, 20, 24)
    graph_module = captured(lambda x: x.mean(PIXELS), x)
    assert split_reductions(graph_module, x.nbytes + 1) is graph_module
    assert split_reductions(graph_module, x.nbytes) is not graph_module


def test_a_large_mean_keeps_its_digits():
    """Mean 1e3, deviation 1: halves are no further from the truth than in one piece."""
    x = (torch.randn(2, 6, 40, 48) + 1e3).half()
    for function in (lambda x: x.mean(PIXELS), lambda x: torch.linalg.vector_norm(x / 100, 2, PIXELS)):
        graph_module = captured(function, x)
        exact = function(x.double())
        whole = (graph_module(x)[0] - exact).abs().max()
        step = torch.finfo(torch.float16).eps * exact.abs().max()
        assert (split_reductions(graph_module, 1)(x)[0] - exact).abs().max() <= whole + step


class Gated(nn.Module):
    """A wide value, gated by its mean and narrowed again."""

    def __init__(self):
        super().__init__()
        self.wide, self.gate, self.narrow = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        y = functional.silu(self.wide(x))
        return self.narrow(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))


class Blocks(Gated):
    """A wide value that is gated by its mean, divided by its length over pixels, and narrowed again."""

    def forward(self, x):
        y = functional.silu(self.wide(x))
        y = y * torch.sigmoid(self.gate(functional.adaptive_avg_pool2d(y, 1)))
        y = y / torch.linalg.vector_norm(y, 2, (2, 3), keepdim=True)
        return self.narrow(y - y.mean((1, 2, 3), keepdim=True))


def streamed_exactly(kind, rel, **options):
    """A small model's plan for "min" and its input, after a run that was as exact and as large as it has to be."""
    torch.manual_seed(0)
    model, x = kind().eval().requires_grad_(False), torch.randn(1, 4, 64, 64)
    streamed = fxstream.optimize(model, "min", (x,), **options)
    [plan] = streamed.plans
    measured = measure_peak(streamed, x)
    assert relative_l2(measured.result, model(x)) <= 1e-6
    assert measured.peak_bytes == pytest.approx(plan.after.peak_bytes, rel=rel)
    return plan, x


def test_statistics_of_all_pixels_are_exact_in_slices():
    plan, x = streamed_exactly(Blocks, 0.01)
    wide = 8 * x.nbytes
    assert plan.before.peak_bytes > 2 * wide > 1.5 * plan.after.peak_bytes


@pytest.mark.parametrize("recompute, most", [(False, 10), (True, 3)])
def test_recompute_goes_past_statistics(recompute, most):
    """Held for its mean, the wide value is in memory whole, eight times the input; computed again, it never is."""
    plan, x = streamed_exactly(Gated, 0.02, allow_recompute=recompute)
    assert plan.after.peak_bytes < most * x.nbytes
    assert (plan.added_flops > 0) == recompute


def test_the_peak_is_as_predicted():
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(2, 16, 64, 64).to(dtype)
        split = split_reductions(captured(lambda x: (x * 2).mean(PIXELS), x), 1)
        assert measure_peak(split, x).peak_bytes == pytest.approx(profile(split).peak_bytes, rel=0.01)
