"""Slicing: loops compute what the graph does, and write only over what is theirs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.candidates import find_candidates, whole
from fxstream.passes.planning.grouping import Group, lengths_of
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.rewriting.slicing import Slicer
from fxstream.runtime.loop import Slice, SlicedLoop
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak
from tests.passes.programs import BLOCKS, Network, TokenFeedForward, example


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(26, 32), requires_grad=False)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


class Sliced:
    """A module with the run from one node on, under one axis, as a loop."""

    def __init__(self, module, inputs, start, seed, slices, end=None):
        self.module, self.inputs = module, inputs
        program = Program(normalize(capture(module, inputs).graph_module))
        position = {value.node.name: index for index, value in enumerate(program.values)}
        [run] = [run for run in find_runs(program, [position[start]]) if run.slices[position[start]] == seed]
        last = run.end if end is None else position[end]
        found = [*find_candidates(program, [run]), whole(program, run)]
        candidate = next(c for c in found if (c.start, c.end) == (run.start, last))
        slicer = Slicer(program)
        group = Group(candidate, lengths_of(run.extent, slices))
        self.graph_module = slicer.rewrite([group])
        self.loop = slicer.loop(group).module

    @property
    def over(self):
        """Which of the loop's outputs are written over an input."""
        return [output.over is not None for output in self.loop.outputs]

    def check(self):
        """The loop computes what the module does, as was predicted, and leaves inputs and weights as they were."""
        before = [tensor.clone() for tensor in (*self.inputs, *self.module.parameters())]
        with torch.no_grad():
            reference = self.module(*self.inputs)
            measured = measure_peak(self.graph_module, *self.inputs)
        reference = reference if isinstance(reference, tuple) else (reference,)
        assert len(measured.result) == len(reference)
        for value, expected in zip(measured.result, reference, strict=True):
            assert value.stride() == expected.stride()
            assert relative_l2(value, expected) <= 1e-6
        for tensor, copy in zip((*self.inputs, *self.module.parameters()), before, strict=True):
            assert torch.equal(tensor, copy)
        assert measured.peak_bytes == pytest.approx(profile(self.graph_module).peak_bytes, rel=0.01, abs=2048)
        return measured.result


X = torch.randn(26, 32)
FRAMES = Slice(0, 26)


def test_what_dies_in_the_loop_is_written_over():
    sliced = Sliced(Call(lambda self, x: (x * 2).exp().sin()), (X,), "exp", FRAMES, 13)
    assert sliced.over == [True]
    sliced.check()
    assert profile(sliced.graph_module).peak_bytes == X.nbytes + 2 * (2 * 32 * 4)


def test_inputs_weights_and_views_of_them_are_never_written():
    sliced = Sliced(Call(lambda self, x: x.exp().sin()), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    sliced.check()
    sliced = Sliced(Call(lambda self, x: self.weight.exp() * x), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    sliced.check()
    sliced = Sliced(Call(lambda self, x: x.view(26, 4, 8).exp().sin()), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    sliced.check()


def test_what_is_still_used_is_not_written_over():
    def later(self, x):
        h = x * 2
        return h.exp().sin().softmax(0) + h

    sliced = Sliced(Call(later), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    sliced.check()

    def returned(self, x):
        h = x * 2
        return h.exp().sin(), h.view(-1)[:3]

    sliced = Sliced(Call(returned), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    sliced.check()


def test_what_other_slices_read_is_not_written_over():
    def transposed(self, x):  # a slice of the result lies across all frames of h
        return (x * 2).exp().t().contiguous().sin()

    sliced = Sliced(Call(transposed), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    sliced.check()

    def whole_too(self, x):  # each slice reads all of h
        h = x * 2
        return h.exp() @ h.t() @ x

    sliced = Sliced(Call(whole_too), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    sliced.check()


def test_a_value_may_be_read_sliced_and_whole():
    sliced = Sliced(Call(lambda self, x: x.exp() @ self.weight.t() @ x), (X,), "exp", FRAMES, 13)
    sliced.check()


def test_fewer_channels_are_written_behind_what_was_read_of_more():
    """Channels lie innermost: row by row the output takes half of what each slice read, from the storage's start on."""

    def function(self, x):
        h = x * 2
        small = torch.nn.functional.conv2d(h, self.weight[:4, :8, None, None])
        return small.relu().sum(2)

    images = torch.randn(1, 8, 6, 5).to(memory_format=torch.channels_last)
    sliced = Sliced(Call(function), (images,), "conv2d", Slice(2, 6), 4, end="relu")
    assert sliced.over == [True]
    sliced.check()


@pytest.mark.parametrize("first", [0, 1])
def test_an_output_has_room_from_where_its_input_begins(first):
    """Each slice reads every second number of a row and fills the row: from the storage's start on that fits."""

    def function(self, x):
        half = (x * 2)[:, first::2]
        return torch.stack([half.exp(), half.sin()], dim=1).softmax(0)

    sliced = Sliced(Call(function), (X,), "exp", FRAMES, 9, end="stack")
    assert sliced.over == [first == 0]
    sliced.check()


@pytest.mark.parametrize("shift", [1, -1])
def test_what_the_next_slice_reads_is_not_written_over(shift):
    """Each slice reads as many steps as it stores, from one before on or to one behind."""

    def function(self, x):
        h = (x * 2).view(26, 4, 8)
        if shift > 0:
            return torch.nn.functional.pad(h, (0, 0, 0, 0, 1, 0))[:-1].exp().sin().softmax(0)
        return torch.nn.functional.pad(h, (0, 0, 0, 0, 0, 1))[1:].exp().sin().softmax(0)

    sliced = Sliced(Call(function), (X,), "view", FRAMES, 9, end="sin")
    assert sliced.over == [False]
    sliced.check()


def test_what_is_returned_holds_no_larger_storage():
    def function(self, x):
        h = x * 2
        return h.exp() @ self.weight[:4].t()

    sliced = Sliced(Call(function), (X,), "exp", FRAMES, 13)
    assert sliced.over == [False]
    [result] = sliced.check()
    assert result.untyped_storage().nbytes() == result.nbytes


def test_one_dying_input_is_given_to_one_output():
    def function(self, x):
        h = x * 2
        first = h.exp()
        return first, first.sin()

    sliced = Sliced(Call(function), (X,), "exp", FRAMES, 13)
    assert sorted(sliced.over) == [False, True]
    first, second = sliced.check()
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("slices", [1, 4, 13, 25, 26])
def test_slices_of_unequal_length(slices):
    sliced = Sliced(TokenFeedForward(), (torch.randn(26, 8, 32),), "layer_norm", FRAMES, slices)
    assert len(sliced.loop.lengths) == slices
    assert set(sliced.loop.graphs()) == {f"{-(-26 // slices)}", f"{26 // slices}"}
    assert sliced.over == [True]
    sliced.check()


def test_the_body_reads_as_python():
    sliced = Sliced(TokenFeedForward(), (torch.randn(26, 8, 32),), "layer_norm", FRAMES, 25)
    for length, body in sliced.loop.graphs().items():
        compile(body.code, "<body>", "exec")
        assert "torch.ops.aten.gelu.default" in body.code
        body.graph.lint()
        assert [node.meta["val"].shape[0] for node in body.graph.nodes if node.name == "gelu"] == [int(length)]
    assert "loop_0" in sliced.graph_module.code
    assert isinstance(sliced.graph_module.loop_0, SlicedLoop)


def test_windows_of_a_merged_dimension():
    """The frames of a (batch * frames) dimension: each slice has its frames of both halves of the batch."""

    def function(self, x):
        x = x * 2
        video = x.exp().view(2, 13, 32).transpose(0, 1)
        return video.contiguous().sin(), (x + 1).cos()

    sliced = Sliced(Call(function), (X,), "exp", Slice(0, 13, outer=2), 5)
    assert Slice(0, 13, outer=2) in sliced.loop.inputs
    sliced.check()


def test_views_of_what_a_loop_makes_are_taken_after_it():
    def function(self, x):
        h = (x * 2).exp().sin()
        part = h.t()[:4]
        return h.softmax(0), part, part.softmax(1)

    sliced = Sliced(Call(function), (X,), "mul", FRAMES, 13)
    assert len(sliced.loop.outputs) == 1
    _, part, _ = sliced.check()
    assert part.untyped_storage().nbytes() == X.nbytes


def test_what_is_independent_of_the_axis_is_computed_once():
    def function(self, x, y):
        return ((x * 2).exp() * (y.sin() @ y).sum(0)).cos()

    sliced = Sliced(Call(function), (X, torch.randn(32, 32)), "mul", FRAMES, 13)
    [body] = sliced.loop.graphs().values()
    assert "matmul" in sliced.graph_module.code and "matmul" not in body.code
    sliced.check()


@settings(max_examples=18, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    pick=st.integers(0, 10**6),
    share=st.floats(0, 1),
)
def test_any_candidate_of_a_network_can_be_a_loop(names, seed, pick, share):
    model, x = Network(names, seed), example(seed)
    program = Program(normalize(capture(model, (x,)).graph_module))
    runs = find_runs(program, range(len(program)))
    candidates = list(find_candidates(program, [runs[pick % len(runs)]]))
    candidate = candidates[pick % len(candidates)]
    slices = 1 + round(share * (candidate.run.extent - 1))
    stored = {candidate.run.slices[index].extent for index in candidate.outputs}
    rewritten = Slicer(program).rewrite([Group(candidate, lengths_of(candidate.run.extent, slices, stored))])
    before = x.clone()
    with torch.no_grad():
        measured = measure_peak(rewritten, x)
        reference = model(x)
    assert torch.equal(x, before)
    assert measured.peak_bytes == pytest.approx(profile(rewritten).peak_bytes, rel=0.01, abs=2048)
    for value, expected in zip(measured.result, reference, strict=True):
        assert value.stride() == expected.stride()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
