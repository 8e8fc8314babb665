"""The pipelines that users run, with a streamed UNet where the UNet stood. Small random components, two steps."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import fxstream
from tests.fxstream.pipeline.pipelines import animatediff

BUDGET = 0.6
PIPELINES = {"animatediff": animatediff}  # whole pipelines: test_pipeline.py


class Case:
    """A pipeline, what it made before its UNet was streamed, and a first generation after."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.pipeline, self.inputs = make()
        self.pipeline.set_progress_bar_config(disable=True)
        self.unet = self.pipeline.unet
        self.expected = self.generate()
        self.pipeline.unet = self.streamed = fxstream.optimize(self.unet, memory_budget=BUDGET)
        self.found = self.generate()
        self.plans = self.streamed.plans

    def generate(self, **changes):
        inputs = {**self.inputs, "num_inference_steps": 2, "output_type": "latent", **changes}
        return self.pipeline(**inputs, generator=torch.Generator().manual_seed(2)).frames


@pytest.fixture(scope="module", params=PIPELINES)
def case(request):
    return Case(PIPELINES[request.param])


def distance(found, expected):
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    return (found.double() - expected.double()).norm() / expected.double().norm()


def test_the_same_video_within_the_budget(case):
    assert distance(case.found, case.expected) <= 1e-5
    assert case.plans[0].groups
    assert case.plans[0].after.peak_bytes <= BUDGET * case.plans[0].before.peak_bytes


def test_one_plan_serves_all_steps_and_generations(case):
    assert len(case.plans) == 1
    assert distance(case.generate(), case.found) == 0
    more = case.generate(num_inference_steps=3)
    assert distance(more, case.found) > 1e-3
    assert case.streamed.plans == case.plans


def test_the_pipeline_sees_its_unet(case):
    pipeline = case.pipeline
    assert pipeline.unet is case.streamed
    assert pipeline.components["unet"] is case.streamed
    assert pipeline.unet.config is case.unet.config
    assert pipeline.dtype is torch.float32
    assert isinstance(pipeline.unet, nn.Module)
    assert pipeline.to("cpu") is pipeline
    assert case.streamed.plans == case.plans


def test_a_weight_fused_between_generations_is_seen(case):
    attention = next(name for name, _ in case.unet.named_modules() if name.endswith("attn1.to_q"))
    weight = case.unet.get_submodule(attention).weight
    saved, plans = weight.detach().clone(), case.streamed.plans
    weight.data += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    found = case.generate()
    case.pipeline.unet = case.unet
    expected = case.generate()
    case.pipeline.unet = case.streamed
    weight.data.copy_(saved)
    assert distance(found, expected) <= 1e-5
    assert distance(found, case.found) > 1e-5
    assert case.streamed.plans == plans


def test_saving(case, tmp_path):
    """What is saved is the model, under its own class."""
    case.pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "config.json").exists()
    library, name = DiffusionPipeline.load_config(tmp_path)["unet"]
    assert (library, name) == ("diffusers", type(case.unet).__name__)
    loaded = type(case.unet).from_pretrained(tmp_path, subfolder="unet")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, case.unet.state_dict()[name])
