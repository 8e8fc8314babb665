"""Devices that aren't here: models stand on them, fake, and are planned as on a machine that has them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fxstream
from fxstream.fake import fake_on

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


def test_what_is_made_inside_is_on_the_device_and_takes_no_memory():
    with fake_on("cuda") as mode:
        layer, x = nn.Linear(8, 4), torch.randn(2, 8)
        made = layer(x), x + x, torch.arange(3), torch.tensor([1.0]), x.to(x.device)
    assert all(isinstance(each, FakeTensor) and each.fake_mode is mode for each in made)
    assert {each.device for each in made} == {torch.device("cuda:0")}
    assert x.to("cpu").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "meta", "xpu", "mps"])
def test_other_devices(device):
    with fake_on(device):
        assert torch.randn(2).exp().device.type == device


def test_a_real_tensor_on_it_is_as_impossible_as_before():
    with fake_on("cuda"):
        pass
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).to("cuda")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x, bias):
        scale = torch.arange(16, device=x.device).to(x.dtype).view(16, 1, 1)
        return self.conv(nn.functional.silu(self.norm(x)) * scale) + bias.to(x.device)


def test_a_model_on_it_is_planned():
    with fxstream.fake_on("cuda", torch.float16):
        model, x = Model().eval(), torch.randn(4, 16, 128, 128)
    bias = torch.zeros(1, dtype=torch.float16)  # real, on the CPU
    plan = fxstream.plan(model, (x, bias), memory_budget=0.6)
    assert plan.groups
    assert plan.after.peak_bytes <= 0.6 * plan.before.peak_bytes
    assert "CUDA card that is not here" in plan.machine
    assert not plan.unmeasured


SMALL = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}

PLANNED = """
import torch, fxstream
from fxstream.tools import catalogue
model, args, kwargs = catalogue.build("svd-vae", frames=4, height=256, width=256, device="cuda")
plan = fxstream.plan(model, args, kwargs, memory_budget=0.4)
print(plan.machine, plan.before.live_bytes, plan.after.live_bytes, plan.launches)
print([(group.name, group.lengths) for group in plan.groups])
"""


def test_the_plan_does_not_depend_on_this_machines_cpu(monkeypatch):
    plans = []
    for environment in ({}, SMALL):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run([sys.executable, "-c", PLANNED], capture_output=True, text=True, check=True)
        plans.append(done.stdout)
    assert plans[0].startswith("a CUDA card") and "loop_0" in plans[0]
    assert plans[0] == plans[1]
