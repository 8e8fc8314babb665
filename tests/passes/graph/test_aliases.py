"""Aliases: tensors of a call that lie over one another are read as they are, and never written to by mistake."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxstream
from fxstream.errors import CaptureError
from fxstream.passes.graph.aliases import overlaps

SHAPE = (4, 8)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("kept", torch.ones(SHAPE))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def apart():
    return torch.randn(SHAPE), torch.randn(SHAPE)


def same():
    x = torch.randn(SHAPE)
    return x, x


def shifted():
    x = torch.randn(40)
    return x[:32].view(SHAPE), x[8:].view(SHAPE)


def halves():
    return tuple(torch.randn(2, *SHAPE))


def expanded():
    return torch.randn(1, 8).expand(SHAPE), torch.randn(SHAPE)


@pytest.mark.parametrize(
    ("made", "pairs"), [(apart, ()), (same, ((0, 1),)), (shifted, ((0, 1),)), (halves, ()), (expanded, ())]
)
def test_pairs_whose_bytes_meet(made, pairs):
    assert overlaps(made()) == pairs
    with torch._subclasses.FakeTensorMode() as mode:
        assert overlaps([mode.from_tensor(x) for x in made()]) == pairs


def write(m, a, b):
    a.add_(1)
    return a + b


@pytest.mark.parametrize(("planned", "made"), [(True, same), (True, shifted), (True, expanded), (False, same)])
def test_a_call_that_writes_to_an_alias_is_refused_first_or_later(planned, made):
    streamed = fxstream.optimize(Call(write), "min")
    if planned:
        streamed(*apart())
    for _ in range(2):
        with pytest.raises(CaptureError, match="writes to its input tensor 0, "):
            streamed(*made())
    mine, its = apart(), None
    its = [x.clone() for x in mine]
    assert torch.equal(streamed(*mine), write(None, *its)) and torch.equal(mine[0], its[0])


def test_halves_of_one_memory_may_be_written():
    streamed = fxstream.optimize(Call(write), "min", halves())
    mine = halves()
    its = [x.clone() for x in mine]
    assert torch.equal(streamed(*mine), write(None, *its)) and torch.equal(mine[0], its[0])


@pytest.mark.parametrize("made", [same, shifted])
def test_aliases_that_are_read_alone_are_read_as_they_are(made):
    model = Call(lambda m, a, b: torch.relu(a) * b + a)
    streamed = fxstream.optimize(model, "min", apart())
    for _ in range(2):
        inputs = made()
        assert torch.equal(streamed(*inputs), model(*inputs))


def test_an_input_that_is_a_buffer_of_the_model():
    def forward(m, a):
        m.kept.mul_(2)
        return a + m.kept

    model = Call(forward)
    streamed = fxstream.optimize(model, "min", (torch.ones(SHAPE),))
    with pytest.raises(CaptureError, match="Call writes to its kept, which shares memory with its input tensor 0"):
        streamed(model.kept)
    assert streamed(torch.ones(SHAPE)).eq(3).all()
    with pytest.raises(CaptureError, match="writes to its input tensor 0, which shares memory with its kept"):
        other = Call(lambda m, a: a.mul_(2) + m.kept)
        fxstream.optimize(other, "min", (other.kept,))


def test_results_are_views_of_what_they_are_views_of_in_the_model():
    def forward(m, a, b):
        a.add_(1)
        return a, a[0], b, b.view(-1), a * b

    mine, its = apart(), apart()
    found, expected = fxstream.optimize(Call(forward), "min", apart())(*mine), forward(None, *its)
    for inputs, results in ((mine, found), (its, expected)):
        places = [x.untyped_storage().data_ptr() for x in (*inputs, *results)]
        assert [places.index(place) for place in places] == [0, 1, 0, 0, 1, 1, 6]
    assert [x.stride() for x in found] == [x.stride() for x in expected]
    assert found[0] is mine[0] and found[2] is mine[1]


def test_a_constant_that_is_returned_is_the_callers():
    model = Call(lambda m, a: (a + 1, torch.tensor([1.0, 2.0]), torch.arange(3)))
    streamed = fxstream.optimize(model, "min", (torch.ones(SHAPE),))
    for result in streamed(torch.ones(SHAPE)):
        result.zero_()
    assert [x.sum() for x in streamed(torch.ones(SHAPE))] == [64, 3, 3]
