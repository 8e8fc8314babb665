"""What a run takes of a card: at least what it holds, loops slice by slice, and little more where pages are free."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxstream
from fxstream.fake import fake_on
from fxstream.passes.graph.reserve import are_expandable, reserve_of
from fxstream.planned import Budget, compile_call

MIB = 2**20


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 2048), nn.Linear(2048, 256)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(scope="module")
def network():
    with fake_on("cuda", torch.float16):
        return nn.Sequential(*(Block() for _ in range(3))).eval(), torch.randn(4, 4096, 256)


@pytest.mark.parametrize("budget", [0.99, 0.3, "min"])
@pytest.mark.parametrize("expandable", [True, False])
def test_it_is_at_least_what_the_run_holds(network, budget, expandable):
    model, x = network
    compiled = compile_call(model, (x,), {}, Budget.parse(budget))
    plan, reserve = compiled.plan, reserve_of(compiled.graph_module, (), expandable)
    held = plan.weight_bytes + plan.input_bytes + plan.after.peak_bytes
    assert held <= reserve.allocated <= reserve.reserved
    assert reserve.allocated <= 1.05 * held
    assert reserve.expandable == expandable
    if expandable:
        assert reserve.reserved <= 1.1 * reserve.allocated + 40 * MIB  # a page of either pool
    assert reserve_of(compiled.graph_module, (50 * MIB,), expandable).allocated == reserve.allocated + 50 * MIB
    assert fxstream.plan(model, (x,), memory_budget=budget).reserve == reserve_of(compiled.graph_module)


def test_a_plan_on_a_cpu_has_none():
    plan = fxstream.plan(Block().eval(), (torch.randn(4, 64, 256),), memory_budget=0.5)
    assert plan.reserve is None
    assert "reserved" not in plan.summary()


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_setting_is_read(monkeypatch, name):
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    assert not are_expandable()
    monkeypatch.setenv(name, "max_split_size_mb:128, expandable_segments:True")
    assert are_expandable()
    monkeypatch.setenv(name, "expandable_segments:False")
    assert not are_expandable()
