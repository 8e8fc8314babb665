"""Ranges: chains of operators that read beyond their slices, cut anywhere, against the chain run whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.candidates import whole
from fxstream.passes.planning.grouping import Group
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.ranges import infer_ranges
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.rewriting.slicing import Slicer

CHANNELS = 4


@st.composite
def layers(draw):
    """One operator along rows: a convolution of any window, a pool, a border, a resize, or one that reads no more."""
    kind = draw(st.sampled_from(["conv", "conv", "conv", "pool", "pad", "nearest", "bilinear", "transposed", "scale"]))
    kernel, stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, kernel // 2))
    if kind == "conv":
        groups = draw(st.sampled_from([1, 2]))
        return nn.Conv2d(CHANNELS, CHANNELS, (kernel, 1), (stride, 1), (padding, 0), (dilation, 1), groups)
    if kind == "pool":
        return nn.MaxPool2d((kernel, 1), (stride, 1), (padding, 0), ceil_mode=draw(st.booleans()))
    if kind == "pad":
        widths = (0, 0, draw(st.integers(0, 2)), draw(st.integers(0, 2)))
        return draw(st.sampled_from([nn.ZeroPad2d, nn.ReplicationPad2d, nn.ReflectionPad2d]))(widths)
    if kind == "nearest":
        return nn.Upsample(scale_factor=2, mode=draw(st.sampled_from(["nearest", "nearest-exact"])))
    if kind == "bilinear":
        return nn.Upsample(scale_factor=2, mode="bilinear")
    if kind == "transposed":
        return nn.ConvTranspose2d(CHANNELS, CHANNELS, (stride + 2, 1), (stride, 1), (1, 0))
    return nn.SiLU()


class Residual(nn.Module):
    """A chain beside its input, where it keeps the shape."""

    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def forward(self, x):
        x = x * 2
        y = self.chain(x)
        return torch.sin(x + y if x.shape == y.shape else y)


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(chain=st.lists(layers(), min_size=1, max_size=4), rows=st.integers(9, 16), data=st.data())
def test_chains_cut_anywhere_equal_the_whole(chain, rows, data):
    model = Residual(nn.Sequential(*chain)).double().eval()
    x = torch.randn(1, CHANNELS, rows, 3, dtype=torch.float64)
    try:
        expected = model(x)
    except RuntimeError:  # a kernel or a border larger than what is left
        assume(False)
    assume(0 not in expected.shape)
    with torch.no_grad():
        program = Program(normalize(capture(model, (x,)).graph_module))
        runs = [run for run in find_runs(program, [0]) if run.slices[0].dim == 2]
        assume(runs)
        candidate = whole(program, runs[0])
        slices = data.draw(st.integers(1, min(candidate.run.steps, 5)))
        cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1), min_size=slices - 1, max_size=slices - 1)))
        lengths = [end - start for start, end in zip([0, *cuts], [*cuts, rows], strict=True)]
        assume(candidate.run.steps >= rows or max(lengths) - min(lengths) <= 1)
        rewritten = Slicer(program).rewrite([Group(candidate, tuple(lengths))])
        [result] = rewritten(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def chain_program() -> Program:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))).eval()
    return Program(normalize(capture(model, (torch.randn(1, 2, 32, 4),)).graph_module))


@pytest.mark.parametrize(
    "part, expected", [((0, 4), (0, 7)), ((4, 8), (1, 11)), ((28, 32), (25, 32))], ids=["first", "middle", "last"]
)
def test_windows_grow_back_through_a_chain_and_stop_at_the_border(part, expected):
    program = chain_program()
    [run] = [run for run in find_runs(program, [0]) if run.slices[0].dim == 2]
    ranges = infer_ranges(program, run, [0, 1, 2], [2], part)
    assert ranges.wanted[2] == part
    assert list(ranges.read.values()) == [expected]
    assert whole(program, run).halo == 6


def test_a_run_ends_where_slices_would_be_mostly_halo():
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(8))).eval()
    program = Program(normalize(capture(model, (torch.randn(1, 2, 16, 4),)).graph_module))
    [run] = [run for run in find_runs(program, [0]) if run.slices[0].dim == 2 and run.start == 0]
    assert run.end < 7
