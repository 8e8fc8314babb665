"""The pipelines that users run, with a streamed UNet where the UNet stood. Small random components, two steps."""

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import fxstream

TEXT = 16  # channels of a text or image embedding
BUDGET = 0.6


def randomized(model):
    """Random values also where initialisation leaves zeros and ones, which would hide a mistake."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("mix_factor"):
            parameter.data.normal_()
        elif not parameter.any() or (parameter == 1).all():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def svd_pipeline():
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=TEXT,
        num_attention_heads=(2, 4),
        num_frames=4,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    vision = CLIPVisionConfig(
        hidden_size=TEXT,
        projection_dim=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=TEXT,
        image_size=224,  # which the pipeline resizes to
        patch_size=56,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        unet=randomized(unet),
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=CLIPImageProcessor(),
    )
    pixels = torch.randint(256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return pipeline, {
        "image": Image.fromarray(pixels.numpy()),
        "height": 48,
        "width": 64,
        "num_frames": 4,
        "output_type": "latent",
    }


def animatediff_pipeline():
    unet = UNetMotionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2)
    pipeline = AnimateDiffPipeline(
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        unet=randomized(unet),
        motion_adapter=None,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    embeds = torch.randn(2, 1, 7, TEXT, generator=torch.Generator().manual_seed(1))
    return pipeline, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "height": 16,
        "width": 24,
        "num_frames": 4,
        "output_type": "latent",
    }


PIPELINES = {"svd": svd_pipeline, "animatediff": animatediff_pipeline}


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
        inputs = {**self.inputs, "num_inference_steps": 2, **changes}
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
