"""Pipelines of diffusers around small random components, each with the arguments of a call that gives pixels."""

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    I2VGenXLPipeline,
    I2VGenXLUNet,
    ModelMixin,
    StableDiffusionPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT = 16  # channels of a text or image embedding


def randomized(model):
    """Random values also where initialisation leaves zeros and ones, which would hide a mistake."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("mix_factor"):
            parameter.data.normal_()
        elif not parameter.any() or (parameter == 1).all():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def image(height, width):
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Image.fromarray(pixels.numpy())


def embeddings():
    """Of a prompt and of the empty one."""
    positive, negative = torch.randn(2, 1, 7, TEXT, generator=torch.Generator().manual_seed(1))
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative}


def vision(image_size, patch_size):
    config = CLIPVisionConfig(
        hidden_size=TEXT,
        projection_dim=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=TEXT,
        image_size=image_size,
        patch_size=patch_size,
    )
    return CLIPVisionModelWithProjection(config).eval()


def image_vae():
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return randomized(vae)


def svd():
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        num_frames=4,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=randomized(vae),
        image_encoder=vision(224, 56),  # the pipeline resizes to 224
        unet=randomized(unet),
        scheduler=EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=CLIPImageProcessor(),
    )
    return pipeline, {"image": image(48, 64), "height": 48, "width": 64, "num_frames": 4}


def animatediff():
    unet = UNetMotionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
    )
    pipeline = AnimateDiffPipeline(
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=randomized(unet),
        motion_adapter=None,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )
    return pipeline, {**embeddings(), "height": 16, "width": 24, "num_frames": 4}


def modelscope():
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipeline = TextToVideoSDPipeline(
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=randomized(unet),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    return pipeline, {**embeddings(), "height": 16, "width": 24, "num_frames": 4}


def i2vgenxl():
    unet = I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        num_attention_heads=4,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=TEXT, intermediate_size=TEXT, num_hidden_layers=1, num_attention_heads=2
    )
    pipeline = I2VGenXLPipeline(
        vae=image_vae(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=None,
        image_encoder=vision(32, 8),
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
        unet=randomized(unet),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    return pipeline, {**embeddings(), "image": image(16, 24), "height": 16, "width": 24, "num_frames": 4}


def stable_diffusion():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=randomized(unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, {**embeddings(), "height": 32, "width": 48}


def wan():
    """Which nothing in fxstream was written for: a transformer, and a decoder that goes frame by frame."""
    transformer = WanTransformer3DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, text_dim=TEXT, ffn_dim=32
    )
    pipeline = WanPipeline(
        vae=randomized(AutoencoderKLWan(base_dim=4, num_res_blocks=1)),
        text_encoder=None,
        tokenizer=None,
        transformer=randomized(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return pipeline, {**embeddings(), "height": 32, "width": 48, "num_frames": 5}


PIPELINES = {
    "svd": svd,
    "animatediff": animatediff,
    "modelscope": modelscope,
    "i2vgenxl": i2vgenxl,
    "stable-diffusion": stable_diffusion,
    "wan": wan,
}


class Denoiser(ModelMixin, ConfigMixin):
    """A denoiser by what it takes: its middle is wide, and can be cut along frames and rows."""

    @register_to_config
    def __init__(self, channels=4, width=32):
        super().__init__()
        self.up, self.down = nn.Linear(channels, width), nn.Linear(width, channels)

    def forward(self, hidden_states, timestep, prompt_embeds, return_dict=False):
        x = hidden_states.movedim(1, -1)
        x = x + self.down(nn.functional.gelu(self.up(x + prompt_embeds.mean()) * (1 + timestep.to(x.dtype) / 1000)))
        return (x.movedim(-1, 1),)


class Codec(ModelMixin, ConfigMixin):
    """A codec by what it offers: four channels of a latent make three of a picture twice as high and wide."""

    @register_to_config
    def __init__(self, width=32, noise=0.0):
        super().__init__()
        self.rise, self.out = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.use_tiling = self.use_slicing = False

    @apply_forward_hook
    def decode(self, z, return_dict=True, generator=None):
        if self.use_tiling or self.use_slicing:
            return DecoderOutput(sample=torch.cat([self._decode(x) for x in z.split(1)]))
        z = self._decode(z)
        if self.config.noise:
            z = z + self.config.noise * randn_tensor(z.shape, generator=generator, dtype=z.dtype)
        return DecoderOutput(sample=z) if return_dict else (z,)

    def _decode(self, z):
        return self.out(nn.functional.gelu(nn.functional.interpolate(self.rise(z), scale_factor=2.0)))

    def forward(self, sample):
        return self.decode(sample)


class TextEncoder(nn.Module):
    """What runs whole: numbers in, an embedding out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, TEXT)

    @property
    def dtype(self):
        return self.table.weight.dtype

    @property
    def device(self):
        return self.table.weight.device

    def forward(self, numbers):
        return self.table(numbers)


class ToyPipeline(DiffusionPipeline):
    """A pipeline of no published class, quick to plan."""

    model_cpu_offload_seq = "text_encoder->denoiser->codec"

    def __init__(self, text_encoder, denoiser, codec, scheduler):
        super().__init__()
        self.register_modules(text_encoder=text_encoder, denoiser=denoiser, codec=codec, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt, height=16, width=24, num_frames=6, num_inference_steps=3, decode_chunk_size=None, generator=None
    ):
        device = self._execution_device
        numbers = torch.tensor([[*prompt.encode(), 0]], device=device)
        embeds = self.text_encoder(numbers).to(self.denoiser.dtype)
        shape = num_frames, 4, height // 2, width // 2
        latents = randn_tensor(shape, generator=generator, device=device, dtype=embeds.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for step in self.progress_bar(self.scheduler.timesteps):
            noise = self.denoiser(latents, step, prompt_embeds=embeds, return_dict=False)[0]
            latents = self.scheduler.step(noise, step, latents).prev_sample
        latents = latents.to(self.codec.dtype)
        parts = latents.split(decode_chunk_size or num_frames)
        decoded = [self.codec.decode(part, generator=generator).sample for part in parts]
        frames = torch.cat(decoded) if len(decoded) > 1 else decoded[0]
        self.maybe_free_model_hooks()
        return frames


def toy(noise=0.0):
    torch.manual_seed(0)
    pipeline = ToyPipeline(
        text_encoder=TextEncoder().eval(),
        denoiser=Denoiser().eval(),
        codec=Codec(noise=noise).eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
