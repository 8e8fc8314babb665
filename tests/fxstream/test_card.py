"""Budgets on a card: what the process holds of it, context and all, is within them; and errors where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxstream
from fxstream.budget import Budget
from fxstream.fake import fake_on
from fxstream.passes.machine.card import OVERHEAD
from tests.passes.graph.test_reserve import Block

MIB = 2**20
there = torch.cuda.is_available()


@pytest.fixture(scope="module")
def network():
    with fake_on("cuda", torch.float16):
        return nn.Sequential(*(Block() for _ in range(3))).eval(), torch.randn(4, 8192, 256)


@pytest.mark.parametrize("expandable", ["True", "False"])
@pytest.mark.parametrize("room", [64, 96, 128, 200])
def test_all_that_is_reserved_is_within_the_budget(network, room, expandable, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"expandable_segments:{expandable}")
    model, x = network
    plan = fxstream.plan(model, (x,), memory_budget=OVERHEAD + room * MIB)
    assert plan.before.peak_bytes > room * MIB
    assert plan.reserve.reserved <= room * MIB
    assert plan.reserve.expandable == (expandable == "True")
    assert f"{plan.reserve.reserved / MIB:.2f} MiB reserved" in str(plan)


def test_the_lowest_that_an_error_tells_of_can_be_asked_for(network):
    model, x = network
    with pytest.raises(fxstream.MemoryBudgetError, match="all that the process holds of the card") as caught:
        fxstream.plan(model, (x,), memory_budget=OVERHEAD + 20 * MIB)
    error = caught.value
    assert error.budget_bytes == OVERHEAD + 20 * MIB
    assert error.lowest_bytes == error.plan.reserve.reserved + OVERHEAD
    plan = fxstream.plan(model, (x,), memory_budget=error.lowest_bytes)
    assert plan.reserve.reserved + OVERHEAD <= error.lowest_bytes


@pytest.mark.skipif(there, reason="there is a card")
def test_what_is_free_of_no_card():
    with pytest.raises(ValueError, match="there is none: give bytes"):
        Budget.parse("device")


@pytest.mark.skipif(not there, reason="needs a card")
def test_what_is_free_of_a_card():
    free, total = torch.cuda.mem_get_info()
    assert 0 < Budget.parse("device").total_bytes <= total
    assert Budget.parse("device").total_bytes <= free + torch.cuda.memory_reserved() + OVERHEAD


def test_a_call_that_runs_out_of_memory_says_what_was_planned():
    model, x = Block().eval(), torch.randn(4, 64, 256)
    streamed = fxstream.optimize(model, 0.5, (x,))
    [compiled] = streamed._compiled.values()

    def full(*tensors):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    object.__setattr__(compiled, "run", full)
    with torch.no_grad(), pytest.raises(fxstream.DeviceMemoryError, match="out of memory") as caught:
        streamed(x)
    assert caught.value.plan is streamed.plans[0]
    assert streamed.plans[0].summary() in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    object.__setattr__(compiled, "run", compiled.graph_module.forward)
    with torch.no_grad():
        assert torch.allclose(streamed(x), model(x), atol=1e-5)
