"""The runtime of loops, by hand: where a slice lies, and what a loop makes of its slices."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxstream.runtime.loop import Output, Slice, SlicedLoop, Step


def indices(piece: Slice, start: int, length: int) -> torch.Tensor:
    """Where the part [start, start + length) lies along its dimension, element by element."""
    places = torch.arange(piece.size).view(piece.outer, piece.extent, piece.inner)
    return places[:, start : start + length].flatten()


@st.composite
def cut_tensors(draw):
    """A tensor in any order of strides, an axis of it, and the bounds of its slices."""
    piece = Slice(draw(st.integers(0, 2)), draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    shape = [draw(st.integers(1, 3)) for _ in range(3)]
    shape[piece.dim] = piece.size
    order = draw(st.permutations(range(3)))
    dense = torch.arange(float(torch.Size(shape).numel())).view([shape[dim] for dim in order])
    inside = draw(st.sets(st.integers(1, piece.extent - 1))) if piece.extent > 1 else set()
    return dense.permute([order.index(dim) for dim in range(3)]), piece, [0, *sorted(inside), piece.extent]


@given(cut_tensors())
def test_a_slice_is_read_and_written_back(case):
    tensor, piece, bounds = case
    whole = torch.full_like(tensor, -1.0)
    for start, end in pairwise(bounds):
        window, part = piece.window(tensor, start, end - start), piece.of(tensor, start, end - start)
        expected = tensor.index_select(piece.dim, indices(piece, start, end - start))
        assert torch.equal(part, expected)
        assert list(part.shape) == piece.resized(tensor.shape, end - start)
        assert torch.equal(window.reshape(expected.shape), expected)
        assert window.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert window.dim() == tensor.dim() + 2 * (piece.outer > 1)
        others = whole.index_select(piece.dim, indices(piece, end, piece.extent - end))
        piece.store(whole, start, part)
        assert torch.equal(whole.index_select(piece.dim, indices(piece, end, piece.extent - end)), others)
    assert torch.equal(whole, tensor)


def test_the_same_axis_in_another_dimension():
    piece = Slice(1, extent=4, outer=2, inner=3)
    assert piece.size == 24
    assert piece.at(0) == Slice(0, 4, 2, 3)
    assert piece.resized((5, 24, 7), 1) == [5, 6, 7]


def output(piece: Slice, like: torch.Tensor, over: int | None = None) -> Output:
    return Output(piece, tuple(like.shape), like.stride(), like.dtype, like.device, over)


def loop_of(lengths, inputs, outputs, bodies) -> SlicedLoop:
    """A loop that reads and writes the same steps everywhere; ``bodies`` by length."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    steps = [
        Step(
            length,
            str(length),
            tuple(None if piece is None else (start, length) for piece in inputs),
            (start,) * len(outputs),
        )
        for start, length in zip(starts, lengths, strict=True)
    ]
    return SlicedLoop(steps, inputs, outputs, {str(length): body for length, body in bodies.items()})


def traced(function) -> fx.GraphModule:
    return fx.symbolic_trace(function)


@pytest.mark.parametrize("lengths", [(7,), (4, 3), (1,) * 7, (3, 2, 2), (1, 5, 1)], ids=str)
def test_ragged_slices(lengths):
    x, weight = torch.randn(7, 5), torch.randn(5, 3)
    expected = (x @ weight).relu()
    body = traced(lambda x, weight: ((x @ weight).relu(),))
    loop = loop_of(lengths, [Slice(0, 7), None], [output(Slice(0, 7), expected)], dict.fromkeys(lengths, body))
    (found,) = loop(x, weight)
    assert torch.allclose(found, expected)
    assert found.stride() == expected.stride()
    assert set(loop.graphs()) == {str(length) for length in lengths}
    assert str(lengths) in repr(loop)


def test_each_length_runs_its_own_body():
    runs = []
    lengths = (3, 3, 2)
    x = torch.randn(8, 2)

    class Body(torch.nn.Module):
        def __init__(self, length):
            super().__init__()
            self.length = length

        def forward(self, x):
            runs.append((self.length, len(x)))
            return (x + 1,)

    loop = loop_of(lengths, [Slice(0, 8)], [output(Slice(0, 8), x)], {3: Body(3), 2: Body(2)})
    assert torch.equal(loop(x)[0], x + 1)
    assert runs == [(3, 3), (3, 3), (2, 2)]


def test_an_axis_inside_a_merged_dimension():
    """Frames, cut out of (batch * frames * 3, channels): a body gets its window split, and may give it back merged."""
    batch, frames, inner = 2, 5, 3
    x = torch.randn(batch * frames * inner, 4)
    along = Slice(0, frames, outer=batch, inner=inner)
    shift = torch.randn(frames)
    lengths = (2, 2, 1)
    expected = x + shift.view(1, frames, 1).expand(batch, frames, inner).reshape(-1, 1)
    seen = []

    class Body(torch.nn.Module):
        def forward(self, window, shift):
            seen.append(tuple(window.shape))
            return ((window + shift[:, None, None]).flatten(0, 2), shift * 2)

    outputs = [output(along, expected), output(Slice(0, frames), shift)]
    loop = loop_of(lengths, [along, Slice(0, frames)], outputs, dict.fromkeys(lengths, Body()))
    found, twice = loop(x, shift)
    assert torch.allclose(found, expected)
    assert torch.equal(twice, shift * 2)
    assert seen == [(batch, length, inner, 4) for length in lengths]


def test_an_axis_that_moves_to_another_dimension():
    x = torch.randn(6, 4)
    lengths = (4, 2)
    body = traced(lambda x: (x.t() * 2, x.sum(1)))
    outputs = [output(Slice(1, 6), (x.t() * 2).contiguous()), output(Slice(0, 6), x.sum(1))]
    doubled, total = loop_of(lengths, [Slice(0, 6)], outputs, dict.fromkeys(lengths, body))(x)
    assert torch.equal(doubled, x.t() * 2) and doubled.is_contiguous()
    assert torch.allclose(total, x.sum(1))


@pytest.mark.parametrize("offset", [0, 8])
def test_an_output_over_an_input(offset):
    """The result takes the input's memory, in its own shape and strides."""
    storage = torch.randn(offset + 24)
    x = storage[offset:].view(6, 4)
    expected = (x * 3 + 1).t()
    lengths = (1, 2, 3)
    body = traced(lambda x: ((x * 3 + 1).t(),))
    loop = loop_of(lengths, [Slice(0, 6)], [output(Slice(1, 6), x.t(), over=0)], dict.fromkeys(lengths, body))
    (found,) = loop(x)
    assert torch.equal(found, expected)
    assert (found.data_ptr(), found.stride()) == (x.data_ptr(), x.t().stride())
    assert torch.equal(x, expected.t())


def test_one_tensor_read_whole_and_in_slices():
    x = torch.randn(6, 4)
    lengths = (4, 2)
    body = traced(lambda part, whole: (part @ whole.t(),))
    loop = loop_of(lengths, [Slice(0, 6), None], [output(Slice(0, 6), x @ x.t())], dict.fromkeys(lengths, body))
    assert torch.allclose(loop(x, x)[0], x @ x.t(), atol=1e-6)


def test_windows_wider_than_what_is_stored():
    """A sum of neighbours, two slices of five: each reads one step more on either side that has one."""
    x = torch.randn(10, 3)
    padded = torch.cat([x.new_zeros(1, 3), x, x.new_zeros(1, 3)])
    expected = padded[:-2] + padded[2:]
    first = traced(lambda x: (torch.nn.functional.pad(x, (0, 0, 1, 0))[:-2] + x[1:],))
    last = traced(lambda x: (x[:-1] + torch.nn.functional.pad(x, (0, 0, 0, 1))[2:],))
    steps = [Step(5, "first", ((0, 6),), (0,)), Step(5, "last", ((4, 6),), (5,))]
    loop = SlicedLoop(steps, [Slice(0, 10)], [output(Slice(0, 10), x)], {"first": first, "last": last})
    assert torch.equal(loop(x)[0], expected)


def test_an_input_of_another_layout_is_not_written_over():
    x = torch.randn(6, 4)
    over = Output(Slice(0, 6), (6, 4), (4, 1), x.dtype, x.device, over=0, over_stride=(1, 6))
    loop = loop_of((3, 3), [Slice(0, 6)], [over], {3: traced(lambda x: (x + 1,))})
    before = x.clone()
    assert torch.equal(loop(x)[0], before + 1)
    assert torch.equal(x, before)


def test_the_number_of_arguments_is_checked():
    x = torch.randn(2)
    loop = loop_of((2,), [Slice(0, 2)], [output(Slice(0, 2), x)], {2: traced(lambda x: (x + 1,))})
    with pytest.raises(ValueError, match="zip"):
        loop(x, x)


def test_it_needs_torch_alone():
    code = "import fxstream.runtime.loop, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert loaded.isdisjoint({"diffusers", "networkx", "tabulate", "transformers", "fxstream.passes", "fxstream.api"})
    ours = {name for name in loaded if name.startswith("fxstream.")} - {"fxstream.runtime"}
    assert {name.rpartition(".")[0] for name in ours} == {"fxstream.runtime"}
