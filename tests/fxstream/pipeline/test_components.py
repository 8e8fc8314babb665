"""What becomes a stage, and what weights weigh."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DModel, VQModel, WanTransformer3DModel
from torch import nn

import fxstream
from fxstream.pipeline.components import modules_of, same_device, stage_name, streamed_methods, weight_bytes
from tests.fxstream.pipeline.pipelines import TextEncoder, toy, vision


@pytest.mark.parametrize(
    "kind, methods",
    [
        (AutoencoderKL, ("encode", "decode")),
        (AutoencoderTiny, ("encode", "decode")),
        (VQModel, ("encode", "decode")),
        (UNet2DModel, ("forward",)),
        (ControlNetModel, ("forward",)),
        (WanTransformer3DModel, ("forward",)),
    ],
)
def test_stages_of_published_classes(kind, methods):
    with torch.device("meta"):
        assert streamed_methods(object.__new__(kind)) == methods


def test_what_runs_whole():
    assert streamed_methods(TextEncoder()) == ()
    assert streamed_methods(vision(32, 8)) == ()


def test_names():
    assert stage_name("unet", "forward") == "unet"
    assert stage_name("vae", "decode") == "vae.decode"


def test_modules_are_the_users_own():
    pipeline = toy()
    before = modules_of(pipeline)
    assert list(before) == ["text_encoder", "denoiser", "codec"]
    fxstream.optimize(pipeline, "min")
    assert all(module is before[name] for name, module in modules_of(pipeline).items())


def test_weights_count_once():
    one, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.bias = one.bias
    one.register_buffer("table", torch.zeros(4, dtype=torch.float64))
    modules = {"one": one, "other": other, "none": nn.SiLU()}
    assert weight_bytes(modules) == {"one": 4 * (15 + 5) + 32, "other": 4 * 15}
    one.to("meta")
    assert weight_bytes(modules, lambda weight: not weight.is_meta) == {"other": 4 * (15 + 5)}


def test_devices():
    assert same_device(torch.device("cuda"), torch.device("cuda:0"))
    assert not same_device(torch.device("cuda:1"), torch.device("cuda:0"))
    assert not same_device(torch.device("cpu"), torch.device("cuda"))
