"""Runs: where an axis goes, where it stops, and what is cut along with it."""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.runtime.loop import Slice
from tests.passes.programs import BLOCKS, Network, example


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.wide = nn.Linear(32, 256)
        self.requires_grad_(False)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def captured(function, *inputs):
    return Program(normalize(capture(Call(function), inputs).graph_module))


def find(program, start, seed):
    """The run that begins at a node under an axis."""
    [at] = [index for index, value in enumerate(program.values) if value.node.name == start]
    [run] = [run for run in find_runs(program, [at]) if run.slices[at] == seed]
    return run


def named(program, run):
    return {program.values[index].node.name: piece for index, piece in run.slices.items()}


def test_frames_of_a_merged_dimension_go_through_views():
    def function(self, x):  # (2 * 5 frames, 32, 7 pixels)
        x = x * 2
        video = x.view(2, 5, 32, 7).permute(0, 2, 1, 3)
        video = video.exp()
        return video.permute(0, 2, 1, 3).reshape(10, 32, 7).sin()

    program = captured(function, torch.randn(10, 32, 7))
    run = find(program, "mul", Slice(0, 5, outer=2))
    assert (run.start, run.end, run.extent) == (0, len(program) - 1, 5)
    slices = named(program, run)
    assert slices["view"] == Slice(1, 5)
    assert slices["exp"] == Slice(2, 5)
    assert slices["sin"] == Slice(0, 5, outer=2)


def test_a_small_value_made_of_a_large_one_is_cut_with_it():
    """A root mean square of x, which doesn't depend on the table that the run begins at."""

    def function(self, x, table):
        table = table * 2
        scale = x.double().pow(2).mean(-1, keepdim=True).rsqrt()
        return x * scale * table

    program = captured(function, torch.randn(4, 6, 512), torch.randn(4, 6, 512))
    run = find(program, "mul", Slice(0, 4))
    assert {"_to_copy", "pow_1", "mean", "rsqrt"} <= named(program, run).keys()


def test_a_mix_along_the_axis_ends_the_run_there_alone():
    def function(self, x):
        x = (x * 2).exp()
        return x.softmax(0).sin().cos()

    program = captured(function, torch.randn(6, 8))
    frames, channels = find(program, "mul", Slice(0, 6)), find(program, "mul", Slice(1, 8))
    assert list(named(program, frames)) == ["mul", "exp"] and frames.end == 1
    assert channels.end == len(program) - 1


def test_a_barrier_ends_every_run():
    def function(self, x):
        x = (x * 2).exp()
        return x.renorm(2, 0, 1.0).sin().cos()

    program = captured(function, torch.randn(6, 8))
    assert {run.end for run in find_runs(program, [0])} == {1}


def test_what_does_not_depend_on_the_axis_stays_whole():
    def function(self, x, scale):  # (frames, pixels, 32), (32)
        x = x * 2
        return (x * scale.exp()).sin()

    program = captured(function, torch.randn(6, 128, 32), torch.randn(32))
    run = find(program, "mul", Slice(0, 6))
    assert list(named(program, run)) == ["mul", "mul_1", "sin"]
    assert run.end == len(program) - 1
    assert [run.cuts[at].inputs for at in sorted(run.slices)][1] == (Slice(0, 6), None)


def test_an_independent_value_is_cut_where_it_is_large():
    def function(self, x, y):
        x = x * 2
        return (x + y.exp()).sin()

    def cut(pixels, read):
        program = captured(function, torch.randn(16, pixels), torch.randn(16, read))
        return "exp" in named(program, find(program, "mul", Slice(0, 16)))

    assert cut(pixels=128, read=128)
    assert not cut(pixels=128, read=1)


def test_what_a_node_read_whole_is_not_cut_for_a_later_one():
    def function(self, x, y):
        x = x * 2
        other = y.exp()
        return ((x @ other) + other).sin()

    program = captured(function, torch.randn(8, 8), torch.randn(8, 8))
    run = find(program, "mul", Slice(0, 8))
    assert list(named(program, run)) == ["mul", "matmul", "add", "sin"]


def test_what_was_cut_is_put_back_where_a_later_node_needs_it_whole():
    def function(self, x, y):
        x = x * 2
        other = y.exp()
        return ((x + other) @ other).sin()

    program = captured(function, torch.randn(8, 8), torch.randn(8, 8))
    run = find(program, "mul", Slice(0, 8))
    assert list(named(program, run)) == ["mul", "add", "matmul", "sin"]


def test_the_halves_of_a_gated_feed_forward_are_cut_together():
    """Their product takes the same channels of both: the weight's rows are cut in each half."""

    def function(self, tokens, x):
        x = x * 2
        value, gate = self.wide(tokens).chunk(2, dim=-1)
        return (x * (value * F.gelu(gate))).sin()

    program = captured(function, torch.randn(6, 32), torch.randn(6, 128))
    run = find(program, "mul", Slice(1, 128))
    slices = named(program, run)
    assert run.end == len(program) - 1
    assert slices["linear"] == Slice(1, 128, outer=2)
    assert slices["getitem"] == slices["getitem_1"] == Slice(1, 128)
    [linear] = [index for index, value in enumerate(program.values) if value.node.name == "linear"]
    assert run.cuts[linear].inputs == (None, Slice(0, 128, outer=2), Slice(0, 128, outer=2))


@settings(max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_runs_of_a_network_hold_together(names, seed):
    program = Program(normalize(capture(Network(names, seed), (example(seed),)).graph_module))
    runs = find_runs(program, range(len(program)))
    assert runs
    for run in runs:
        assert run.slices.keys() == run.cuts.keys()
        for index in range(run.start, run.end + 1):
            reads = [program.position.get(node, -1) for node in program.values[index].reads]
            if index not in run.slices:
                assert not run.slices.keys() & set(reads)
                continue
            value = program.values[index].node.meta["val"]
            piece = run.slices[index]
            for tensor in [value] if isinstance(value, torch.Tensor) else value:
                assert tensor.shape[piece.dim] == piece.size
            for at, read in zip(reads, run.cuts[index].inputs, strict=True):
                assert at not in run.slices or run.slices[at] == read
