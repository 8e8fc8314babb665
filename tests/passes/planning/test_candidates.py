"""Candidates: what a loop is estimated to take, against what the loop that is built takes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.candidates import find_candidates, whole
from fxstream.passes.planning.grouping import Group, lengths_of
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.rewriting.slicing import Slicer
from tests.passes.programs import TokenFeedForward

KIB = 1024


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def captured(module, *inputs):
    return Program(normalize(capture(module, inputs).graph_module))


@pytest.fixture(scope="module")
def feedforward():
    return captured(TokenFeedForward(), torch.randn(26, 64, 32))


def built(program, candidate, slices):
    """The live bytes at the loop that a candidate becomes."""
    group = Group(candidate, lengths_of(candidate.run.extent, slices))
    found = profile(Slicer(program).rewrite([group]))
    [at] = [index for index, name in enumerate(found.nodes) if name.startswith("loop")]
    return found.live_bytes[at]


def estimates_hold(program, extent, slices):
    candidates = find_candidates(program, find_runs(program, range(len(program))))
    candidates = [candidate for candidate in candidates if candidate.run.extent == extent]
    assert len(candidates) > 10
    for candidate in candidates:
        assert candidate.peak_bytes(slices) == pytest.approx(built(program, candidate, slices), rel=0.1)


@pytest.mark.parametrize("slices", [2, 5, 13, 26])
def test_the_estimate_of_a_feed_forward_holds(feedforward, slices):
    estimates_hold(feedforward, 26, slices)


@pytest.mark.xfail(strict=True, reason="the packed copy that a product makes of a strided window is not estimated")
@pytest.mark.parametrize("slices", [2, 5])
def test_the_estimate_of_a_feed_forward_over_tokens_holds(feedforward, slices):
    estimates_hold(feedforward, 64, slices)


def test_a_whole_run_begins_and_ends_as_the_run_does(feedforward):
    for run in find_runs(feedforward, [0]):
        candidate = whole(feedforward, run)
        assert (candidate.start, candidate.end) == (run.start, run.end)
        assert candidate.outputs == (run.end,)


def test_intervals_are_of_the_run_and_each_once(feedforward):
    run = find_runs(feedforward, [0])[0]
    seen = Counter((candidate.start, candidate.end) for candidate in find_candidates(feedforward, [run]))
    assert max(seen.values()) == 1
    assert all(run.start <= start < end <= run.end for start, end in seen)


def test_what_runs_have_in_common_is_told_once(feedforward):
    runs = [run for start in range(3) for run in find_runs(feedforward, [start])]

    def interval(candidate):
        run, within = candidate.run, range(candidate.start, candidate.end + 1)
        return run.extent, run.steps, tuple((at, run.slices[at]) for at in within if at in run.slices)

    alone = Counter(interval(candidate) for run in runs for candidate in find_candidates(feedforward, [run]))
    together = Counter(interval(candidate) for candidate in find_candidates(feedforward, runs))
    assert together.keys() == alone.keys()
    assert max(together.values()) == 1 < max(alone.values())


def test_a_hill_is_a_candidate_however_low_the_rest_of_the_run_is():
    def function(x):
        for _ in range(12):
            x = x.sin()
        first, second = x.exp(), x.cos()
        wide = torch.cat([first, second] * 4, 1)
        narrow = wide.tan().unflatten(1, (8, 256)).sum(1)
        x = first + second * narrow
        for _ in range(12):
            x = x.sin()
        return x

    program = captured(Call(function), torch.randn(12, 256))
    targets = [str(value.call.target) for value in program.values]
    hill = (targets.index("aten.cat.default"), targets.index("aten.sum.dim_IntList"))
    run = next(run for run in find_runs(program, [0]) if run.extent == 12)
    assert hill in {(candidate.start, candidate.end) for candidate in find_candidates(program, [run])}


def test_a_loop_costs_what_its_inputs_and_outputs_and_one_body_hold():
    def function(x):
        h = x * 2  # 12 frames of 1 KiB
        wide = torch.cat([h, h, h, h], 1)
        return wide.exp().unflatten(1, (4, 256)).sum(1)

    program = captured(Call(function), torch.randn(12, 256))
    run = next(run for run in find_runs(program, [1]) if run.extent == 12)
    candidate = whole(program, run)
    # h dies in the loop and what it returns lies over it.
    assert list(candidate.over) == [candidate.end]
    assert candidate.fixed_bytes == 12 * KIB
    assert candidate.body_bytes(1) == (4 + 4) * KIB
    assert candidate.peak_bytes(5) == (12 + 3 * 8) * KIB  # the longest of five slices has three frames
    assert candidate.launches == 3


def test_slices_too_small_for_the_fast_kernel_are_told():
    """oneDNN takes one sample from 20480 elements without the last dimension on: 41 rows here, 2 of them overlap."""
    convolution = nn.Conv3d(64, 64, 3, padding=1).requires_grad_(False)
    program = captured(Call(lambda x: convolution(x.sin()).cos()), torch.randn(1, 64, 8, 96, 4))
    runs = {run.extent: whole(program, run) for run in find_runs(program, [0])}
    assert runs[96].slowed == ((39, 2 * 64 * 64 * 27 * 8 * 96 * 4),)


def test_what_the_loop_returns_is_what_outlives_it():
    def function(x):
        first = x.exp()
        second = first.sin()
        third = second.cos()
        return first, third

    program = captured(Call(function), torch.randn(12, 256))
    run = next(run for run in find_runs(program, [0]) if run.extent == 12)
    assert whole(program, run).outputs == (0, 2)


def test_what_is_hoisted_counts_while_it_is_made():
    def function(x, y):
        return (x.exp() * (y.sin() @ y.cos()).sum()).sin()

    y = torch.randn(64, 64)  # 16 KiB
    program = captured(Call(function), torch.randn(12, 8), y)
    run = next(run for run in find_runs(program, [0]) if run.extent == 12)
    candidate = whole(program, run)
    assert candidate.fixed_bytes == pytest.approx(3 * 16 * KIB, rel=0.05)


def test_measured_bodies_take_the_place_of_the_estimate(feedforward):
    run = find_runs(feedforward, [0])[0]
    candidate = whole(feedforward, run)
    estimate = candidate.body_bytes(2)
    candidate.measured[2] = int(2 * estimate)
    assert candidate.body_bytes(2) == int(2 * estimate)
    assert candidate.body_bytes(1) == int(2 * estimate)  # no less is promised of a shorter one
    assert candidate.body_bytes(4) == 2 * int(2 * estimate)
