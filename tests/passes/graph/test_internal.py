from pathlib import Path

import pytest
import torch
from torch import nn

import fxstream
from fxstream.passes.operators.axes import rule


@torch.library.custom_op("fxstream_tests::puzzle", mutates_args=())
def puzzle(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@puzzle.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@rule(torch.ops.fxstream_tests.puzzle.default)
def broken(call, out):
    raise KeyError("no such thing")


class Puzzled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return puzzle(x.exp()) * 2


def test_what_goes_wrong_inside_is_told_with_the_graph_saved():
    with pytest.raises(fxstream.InternalError, match="planning: KeyError") as caught:
        fxstream.plan(Puzzled(), (torch.randn(64, 64),))
    assert "report" in str(caught.value) and caught.value.path in str(caught.value)
    saved = Path(caught.value.path)
    text = saved.read_text()
    saved.unlink()
    assert isinstance(caught.value.__cause__, KeyError)
    for part in ("torch 2", "no such thing", "fxstream_tests.puzzle.default", "float32[64, 64] strides [64, 1]"):
        assert part in text


def test_errors_of_its_own_are_left_as_they_are():
    with pytest.raises(fxstream.MemoryBudgetError):
        fxstream.plan(nn.Linear(64, 64), (torch.randn(64, 64),), memory_budget=1)
