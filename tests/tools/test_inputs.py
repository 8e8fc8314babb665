"""Inputs made up for models that the catalogue doesn't know."""

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxstream.tools.catalogue import Shape
from fxstream.tools.errors import UsageError
from fxstream.tools.inputs import example_inputs


class Configured(torch.nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = config


ONE = {"num_layers": 1, "num_attention_heads": 2}

# Class, configuration, method, and the sizes of some inputs for 9 frames of 128 x 192, batch 2.
MODELS = {
    "wan": (
        "WanTransformer3DModel",
        {**ONE, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 32},
        "forward",
        {"hidden_states": (2, 16, 3, 16, 24), "encoder_hidden_states": (2, 256, 16), "timestep": (2,)},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {**ONE, "attention_head_dim": 8, "text_embed_dim": 16, "max_text_seq_length": 12},
        "forward",
        {"hidden_states": (2, 3, 16, 16, 24), "encoder_hidden_states": (2, 12, 16)},
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {
            **ONE,
            "attention_head_dim": 16,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 6, 8),
        },
        "forward",
        {"hidden_states": (2, 16, 3, 16, 24), "encoder_attention_mask": (2, 256), "pooled_projections": (2, 8)},
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {**ONE, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16},
        "forward",
        {"hidden_states": (2, 2 * 4 * 6, 128)},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **ONE,
            "attention_head_dim": 8,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "sample_size": 32,
        },
        "forward",
        {"hidden_states": (18, 16, 16, 24), "encoder_hidden_states": (18, 256, 16), "pooled_projections": (18, 8)},
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            **ONE,
            "attention_head_dim": 16,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "in_channels": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 6, 6),
        },
        "forward",
        {"hidden_states": (18, 8 * 12, 16), "img_ids": (8 * 12, 3), "txt_ids": (256, 3)},
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 12,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
            "layers_per_block": 1,
        },
        "forward",
        {"sample": (18, 4, 16, 24), "encoder_hidden_states": (18, 77, 12)},
    ),
    "wan vae": ("AutoencoderKLWan", {"base_dim": 4, "num_res_blocks": 1}, "decode", {"z": (2, 16, 3, 16, 24)}),
    "svd vae": (
        "AutoencoderKLTemporalDecoder",
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
        "decode",
        {"z": (18, 4, 64, 96)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_latent_lies_as_the_model_wants_it(name):
    kind, config, method, sizes = MODELS[name]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = getattr(diffusers, kind)(**config)
        (args, kwargs), shape = example_inputs(model, method, Shape(9, 128, 192, 2), torch.float32)
        getattr(model, method)(*args, **kwargs)
    assert shape == Shape(9, 128, 192, 2)
    assert {key: tuple(kwargs[key].shape) for key in sizes} == sizes
    assert kwargs["return_dict"] is False or "return_dict" not in kwargs


def test_an_image_model_may_have_one_frame():
    kind, config, method, _ = MODELS["sdxl"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = getattr(diffusers, kind)(**config)
        (_, kwargs), shape = example_inputs(model, method, Shape(9, 128, 192, 2), torch.float32, one_frame=True)
    assert shape == Shape(1, 128, 192, 2)
    assert kwargs["sample"].shape == (2, 4, 16, 24)


def test_arguments_that_nobody_knows():
    class Odd(Configured):
        def forward(self, sample, weather): ...

    with pytest.raises(UsageError, match=r"Odd\.forward takes weather, .* package\.module:function"):
        example_inputs(Odd(), "forward", Shape(1, 64, 64), torch.float32)


def test_a_configuration_that_says_too_little():
    class Silent(Configured):
        def forward(self, sample): ...

    with pytest.raises(UsageError, match=r"configuration of Silent.forward doesn't tell the size of sample"):
        example_inputs(Silent(), "forward", Shape(1, 64, 64), torch.float32)


def test_a_model_that_refuses_every_layout():
    class Refusing(Configured):
        def forward(self, sample):
            raise ValueError(f"{sample.ndim} dimensions")

    with pytest.raises(UsageError, match=r"no example inputs for Refusing.forward were found \(ValueError: 5 dim"):
        example_inputs(Refusing(in_channels=4), "forward", Shape(1, 64, 64), torch.float32)
