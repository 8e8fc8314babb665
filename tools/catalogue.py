"""The models that fxstream is tested and measured on, as data.

An entry names a class of diffusers, the configuration it was published with, the shapes it is run at, and how its
inputs follow from both. `build` gives the published model without its weights: fake tensors with shapes and no memory.
`small` gives the same class with a few channels and random weights, which runs on any CPU.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from fxstream.fake import default_dtype, fake_on

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """The size of one call: a video's frames, and its height and width in pixels.

    A step of the latent stands for ``steps``: frames, of which the first has a step of its own, and pixels each way.
    """

    frames: int
    height: int
    width: int
    batch: int = 2  # classifier-free guidance runs the prompt and the empty prompt together
    steps: tuple[int, int] = (1, 8)

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent."""
        return self.height // self.steps[1], self.width // self.steps[1]

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // self.steps[0] + 1

    def resized(self, **sizes: int | None) -> Shape:
        """The same with other frames, height, width or batch, where they are not None."""
        given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        return replace(self, **given)


@dataclass(frozen=True)
class Entry:
    """One model: `class_path` as `pkgutil.resolve_name` reads it, `source` the repository on Hugging Face and its file.

    `small` overrides `config` for a model that runs in a test. `inputs(config, shape, dtype)` makes the arguments and
    keyword arguments of `method`, in the layout in which the model's pipeline passes them. `pipeline` is diffusers'
    class that has the model as its `component`.
    """

    name: str
    class_path: str
    source: str
    config: Mapping[str, Any]
    small: Mapping[str, Any]
    shape: Shape
    inputs: Callable[[Mapping[str, Any], Shape, torch.dtype], Inputs]
    method: str = "forward"
    pipeline: str = ""
    component: str = "unet"


def svd_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents (batch, frames, 8, h, w): 4 channels of noise, 4 of the image; one CLIP embedding of the image."""
    latents = torch.randn(shape.batch, shape.frames, 8, *shape.latent, dtype=dtype)
    image = torch.randn(shape.batch, 1, config["cross_attention_dim"], dtype=dtype)
    # Frames a second less one, motion bucket, noise added to the image: the pipeline's defaults.
    time_ids = torch.tensor([[6.0, 127.0, 0.02]] * shape.batch, dtype=dtype)
    timestep = torch.tensor(1.0, dtype=torch.float32)  # Euler: log(sigma) / 4
    return (latents, timestep, image), {"added_time_ids": time_ids, "return_dict": False}


def text_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents (batch, 4, frames, h, w) and a text embedding (batch, 77, channels)."""
    latents = torch.randn(shape.batch, 4, shape.frames, *shape.latent, dtype=dtype)
    text = torch.randn(shape.batch, 77, config["cross_attention_dim"], dtype=dtype)
    return (latents, torch.tensor(500), text), {"return_dict": False}


def animatediff_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """As `text_inputs`, the text repeated for each frame: (batch * frames, 77, channels)."""
    (latents, timestep, text), kwargs = text_inputs(config, shape, dtype)
    return (latents, timestep, text.repeat_interleave(shape.frames, dim=0)), kwargs


def i2vgenxl_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Noise and image latents (batch, 4, frames, h, w), an image and a text embedding, and frames a second."""
    (latents, timestep, text), kwargs = text_inputs(config, shape, dtype)
    conditions = {
        "image_latents": torch.randn_like(latents),
        "image_embeddings": torch.randn(shape.batch, config["cross_attention_dim"], dtype=dtype),
        "encoder_hidden_states": text,
    }
    return (latents, timestep, torch.tensor([16] * shape.batch)), conditions | kwargs


def latent_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents of images or of the frames of videos, one after another: (batch * frames, 4, h, w)."""
    latents = torch.randn(shape.batch * shape.frames, config["latent_channels"], *shape.latent, dtype=dtype)
    return (latents,), {"return_dict": False}


def video_latent_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """As `latent_inputs`, with the number of frames of a video."""
    args, kwargs = latent_inputs(config, shape, dtype)
    return args, kwargs | {"num_frames": shape.frames}


def image_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Images of 3 channels: (batch * frames, 3, height, width)."""
    images = torch.randn(shape.batch * shape.frames, 3, shape.height, shape.width, dtype=dtype)
    return (images,), {"return_dict": False}


def video_code_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents of videos, their frames compressed too: (batch, channels, frames, h, w)."""
    channels = config["z_dim" if "z_dim" in config else "latent_channels"]
    latents = torch.randn(shape.batch, channels, shape.latent_frames, *shape.latent, dtype=dtype)
    return (latents,), {"return_dict": False}


def wan_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents (batch, 16, frames, h, w), a timestep a sample, and T5's embedding (batch, 512, channels)."""
    latents = torch.randn(shape.batch, config["in_channels"], shape.latent_frames, *shape.latent, dtype=dtype)
    text = torch.randn(shape.batch, 512, config["text_dim"], dtype=dtype)
    return (latents, torch.full((shape.batch,), 500), text), {"return_dict": False}


def cogvideox_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents (batch, frames, 16, h, w), T5's embedding (batch, 226, channels), and a timestep a sample."""
    latents = torch.randn(shape.batch, shape.latent_frames, config["in_channels"], *shape.latent, dtype=dtype)
    text = torch.randn(shape.batch, config["max_text_seq_length"], config["text_embed_dim"], dtype=dtype)
    return (latents, text, torch.full((shape.batch,), 500)), {"return_dict": False}


def ltx_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents as tokens (batch, frames * h * w, 128), T5's embedding (batch, 128, channels) with its mask."""
    frames, (height, width) = shape.latent_frames, shape.latent
    latents = torch.randn(shape.batch, frames * height * width, config["in_channels"], dtype=dtype)
    text = torch.randn(shape.batch, 128, config["caption_channels"], dtype=dtype)
    mask = torch.ones(shape.batch, 128, dtype=torch.int64)
    every_frame, pixels = shape.steps
    sizes = {"num_frames": frames, "height": height, "width": width}
    scale = {"rope_interpolation_scale": (every_frame / 25, pixels, pixels)}  # 25 frames a second
    return (latents, text, torch.full((shape.batch,), 500), mask), sizes | scale | {"return_dict": False}


def hunyuanvideo_inputs(config: Mapping[str, Any], shape: Shape, dtype: torch.dtype) -> Inputs:
    """Latents (batch, 16, frames, h, w), Llama's embedding (batch, 256, channels) with its mask, CLIP's, and guidance.

    Guidance is an input of the distilled model, which needs no empty prompt.
    """
    latents = torch.randn(shape.batch, config["in_channels"], shape.latent_frames, *shape.latent, dtype=dtype)
    conditions = {
        "encoder_hidden_states": torch.randn(shape.batch, 256, config["text_embed_dim"], dtype=dtype),
        "encoder_attention_mask": torch.ones(shape.batch, 256, dtype=torch.int64),
        "pooled_projections": torch.randn(shape.batch, config["pooled_projection_dim"], dtype=dtype),
        "guidance": torch.full((shape.batch,), 6000.0, dtype=dtype),
    }
    return (latents, torch.full((shape.batch,), 500)), conditions | {"return_dict": False}


# The four channel widths of Stable Diffusion 1 and 2, which all of these share.
WIDTHS = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
SMALL_WIDTHS = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "cross_attention_dim": 32}

SVD = Entry(
    name="svd-unet",
    class_path="diffusers:UNetSpatioTemporalConditionModel",
    source="stabilityai/stable-video-diffusion-img2vid, unet/config.json",
    config=WIDTHS
    | {
        "sample_size": 96,
        "in_channels": 8,
        "out_channels": 4,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 768,
        "cross_attention_dim": 1024,
        "num_attention_heads": (5, 10, 20, 20),
        "num_frames": 14,
    },
    small=SMALL_WIDTHS
    | {
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 96,
        "num_attention_heads": (2, 4, 4, 4),
    },
    shape=Shape(frames=14, height=576, width=1024),
    inputs=svd_inputs,
    pipeline="StableVideoDiffusionPipeline",
)

SVD_XT = replace(
    SVD,
    name="svd-xt-unet",
    source="stabilityai/stable-video-diffusion-img2vid-xt, unet/config.json",
    config={**SVD.config, "num_frames": 25},
    shape=Shape(frames=25, height=576, width=1024),
)

ANIMATEDIFF = Entry(
    name="animatediff-unet",
    class_path="diffusers:UNetMotionModel",
    source="Stable Diffusion 1.5, unet/config.json, with guoyww/animatediff-motion-adapter-v1-5-2, config.json",
    config=WIDTHS
    | {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "num_attention_heads": 8,
        "motion_num_attention_heads": 8,
        "motion_max_seq_length": 32,
        "use_motion_mid_block": True,
    },
    small=SMALL_WIDTHS | {"num_attention_heads": 2, "motion_num_attention_heads": 2, "norm_num_groups": 8},
    shape=Shape(frames=16, height=576, width=1024),
    inputs=animatediff_inputs,
    pipeline="AnimateDiffPipeline",
)

# In the two below `attention_head_dim` is the width of a head, not their number.
MODELSCOPE = Entry(
    name="modelscope-unet",
    class_path="diffusers:UNet3DConditionModel",
    source="damo-vilab/text-to-video-ms-1.7b, unet/config.json",
    config=WIDTHS | {"sample_size": 32, "cross_attention_dim": 1024, "attention_head_dim": 64},
    small=SMALL_WIDTHS | {"attention_head_dim": 16, "norm_num_groups": 8},
    shape=Shape(frames=16, height=320, width=576),
    inputs=text_inputs,
    pipeline="TextToVideoSDPipeline",
)

I2VGENXL = Entry(
    name="i2vgenxl-unet",
    class_path="diffusers:I2VGenXLUNet",
    source="ali-vilab/i2vgen-xl, unet/config.json",
    config=WIDTHS | {"sample_size": 32, "cross_attention_dim": 1024, "attention_head_dim": 64},
    small=SMALL_WIDTHS | {"attention_head_dim": 16, "norm_num_groups": 8},
    shape=Shape(frames=16, height=704, width=1280),
    inputs=i2vgenxl_inputs,
    pipeline="I2VGenXLPipeline",
)

VAE_WIDTHS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
SMALL_VAE_WIDTHS = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}

SVD_VAE = Entry(
    name="svd-vae",
    class_path="diffusers:AutoencoderKLTemporalDecoder",
    source="stabilityai/stable-video-diffusion-img2vid, vae/config.json",
    config=VAE_WIDTHS
    | {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "sample_size": 768,
        "scaling_factor": 0.18215,
        "force_upcast": True,
    },
    small=SMALL_VAE_WIDTHS,
    shape=Shape(frames=14, height=576, width=1024, batch=1),
    inputs=video_latent_inputs,
    method="decode",
    pipeline="StableVideoDiffusionPipeline",
    component="vae",
)

SD_VAE = Entry(
    name="sd-vae",
    class_path="diffusers:AutoencoderKL",
    source="stabilityai/sd-vae-ft-mse, config.json",
    config=VAE_WIDTHS
    | {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 256,
    },
    small=SMALL_VAE_WIDTHS,
    shape=Shape(frames=16, height=576, width=1024, batch=1),
    inputs=latent_inputs,
    method="decode",
    pipeline="AnimateDiffPipeline",
    component="vae",
)

SD_VAE_ENCODE = replace(SD_VAE, name="sd-vae-encode", inputs=image_inputs, method="encode")

# The transformers below and the decoders of their videos. Where the configuration is that of the class's defaults,
# only what their inputs are made of stands here.
WAN = Entry(
    name="wan-transformer",
    class_path="diffusers:WanTransformer3DModel",
    source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json",
    config={
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "num_layers": 30,
        "in_channels": 16,
        "text_dim": 4096,
    },
    small={"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2, "text_dim": 32},
    shape=Shape(frames=81, height=480, width=832, steps=(4, 8)),
    inputs=wan_inputs,
    pipeline="WanPipeline",
    component="transformer",
)

COGVIDEOX = Entry(
    name="cogvideox-transformer",
    class_path="diffusers:CogVideoXTransformer3DModel",
    source="THUDM/CogVideoX-2b, transformer/config.json",
    config={
        "num_attention_heads": 30,
        "num_layers": 30,
        "in_channels": 16,
        "text_embed_dim": 4096,
        "max_text_seq_length": 226,
        "sample_frames": 49,
    },
    small={"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 32}
    | {"text_embed_dim": 32, "max_text_seq_length": 16},
    shape=Shape(frames=49, height=480, width=720, steps=(4, 8)),
    inputs=cogvideox_inputs,
    pipeline="CogVideoXPipeline",
    component="transformer",
)

LTX = Entry(
    name="ltx-transformer",
    class_path="diffusers:LTXVideoTransformer3DModel",
    source="Lightricks/LTX-Video, transformer/config.json",
    config={"num_attention_heads": 32, "num_layers": 28, "in_channels": 128, "caption_channels": 4096},
    small={"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 2}
    | {"in_channels": 16, "out_channels": 16, "caption_channels": 32},
    shape=Shape(frames=161, height=512, width=768, steps=(8, 32)),
    inputs=ltx_inputs,
    pipeline="LTXPipeline",
    component="transformer",
)

HUNYUANVIDEO = Entry(
    name="hunyuanvideo-transformer",
    class_path="diffusers:HunyuanVideoTransformer3DModel",
    source="hunyuanvideo-community/HunyuanVideo, transformer/config.json",
    config={
        "num_attention_heads": 24,
        "num_layers": 20,
        "num_single_layers": 40,
        "in_channels": 16,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
    },
    small={"num_attention_heads": 2, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6), "num_layers": 1}
    | {"num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 16},
    shape=Shape(frames=129, height=544, width=960, batch=1, steps=(4, 8)),
    inputs=hunyuanvideo_inputs,
    pipeline="HunyuanVideoPipeline",
    component="transformer",
)

WAN_VAE = Entry(
    name="wan-vae",
    class_path="diffusers:AutoencoderKLWan",
    source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers, vae/config.json",
    config={"base_dim": 96, "z_dim": 16},
    small={"base_dim": 8, "num_res_blocks": 1},
    shape=Shape(frames=81, height=480, width=832, batch=1, steps=(4, 8)),
    inputs=video_code_inputs,
    method="decode",
    pipeline="WanPipeline",
    component="vae",
)

COGVIDEOX_VAE = Entry(
    name="cogvideox-vae",
    class_path="diffusers:AutoencoderKLCogVideoX",
    source="THUDM/CogVideoX-2b, vae/config.json",
    config={
        "block_out_channels": (128, 256, 256, 512),
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "layers_per_block": 3,
        "latent_channels": 16,
    },
    small={"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    shape=Shape(frames=49, height=480, width=720, batch=1, steps=(4, 8)),
    inputs=video_code_inputs,
    method="decode",
    pipeline="CogVideoXPipeline",
    component="vae",
)

LTX_VAE = Entry(
    name="ltx-vae",
    class_path="diffusers:AutoencoderKLLTXVideo",
    source="Lightricks/LTX-Video, vae/config.json",
    config={"latent_channels": 128},
    small={"block_out_channels": (8, 16, 16, 16), "decoder_block_out_channels": (8, 16, 16, 16)}
    | {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "latent_channels": 16},
    shape=Shape(frames=161, height=512, width=768, batch=1, steps=(8, 32)),
    inputs=video_code_inputs,
    method="decode",
    pipeline="LTXPipeline",
    component="vae",
)

HUNYUANVIDEO_VAE = Entry(
    name="hunyuanvideo-vae",
    class_path="diffusers:AutoencoderKLHunyuanVideo",
    source="hunyuanvideo-community/HunyuanVideo, vae/config.json",
    config={"latent_channels": 16},
    small={"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
    shape=Shape(frames=33, height=544, width=960, batch=1, steps=(4, 8)),
    inputs=video_code_inputs,
    method="decode",
    pipeline="HunyuanVideoPipeline",
    component="vae",
)

UNETS = (SVD, SVD_XT, ANIMATEDIFF, MODELSCOPE, I2VGENXL)
TRANSFORMERS = (WAN, COGVIDEOX, LTX, HUNYUANVIDEO)
VAES = (SVD_VAE, SD_VAE, SD_VAE_ENCODE, WAN_VAE, COGVIDEOX_VAE, LTX_VAE, HUNYUANVIDEO_VAE)
ENTRIES = (*UNETS, *TRANSFORMERS, *VAES)
CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}


def _unet_levels(down: str, up: str) -> dict[str, Any]:
    """Two levels of a UNet with blocks of these names, of which the upper has attention."""
    return {
        "down_block_types": (f"CrossAttn{down}", down),
        "up_block_types": (up, f"CrossAttn{up}"),
        "block_out_channels": (32, 64),
    }


_VAE_LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 64)}
_TWO_UP = {"up_block_types": ("UpDecoderBlock2D",) * 2}

TWO_LEVELS: dict[str, dict[str, Any]] = {
    "svd-unet": _unet_levels("DownBlockSpatioTemporal", "UpBlockSpatioTemporal") | {"num_attention_heads": (2, 4)},
    "animatediff-unet": _unet_levels("DownBlockMotion", "UpBlockMotion"),
    "modelscope-unet": _unet_levels("DownBlock3D", "UpBlock3D"),
    "i2vgenxl-unet": _unet_levels("DownBlock3D", "UpBlock3D"),
    "svd-vae": _VAE_LEVELS,
    "sd-vae": _VAE_LEVELS | _TWO_UP,
    "sd-vae-encode": _VAE_LEVELS | _TWO_UP,
}
"""What leaves two levels of a small model, for what takes long with more of them."""


def shallow(name: str) -> Entry:
    """The model of that name with two levels where it is small, if it has levels at all."""
    entry = _entry(name)
    return replace(entry, small={**entry.small, **TWO_LEVELS.get(name, {})})


def build(
    name: str | Entry,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    fake: bool = True,
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Returns the model (or its method) at its published configuration, in eval mode, with its args and kwargs.

    `name` may be an entry itself. `height` and `width` are in pixels; what is not given is as the entry says. With
    `fake`, weights and inputs are fake tensors of one FakeTensorMode and nothing is allocated, else they are random.
    """
    entry = name if isinstance(name, Entry) else _entry(name)
    shape = entry.shape.resized(frames=frames, height=height, width=width, batch=batch)
    with building(device, fake):
        model = _construct(entry, entry.config, dtype)
        args, kwargs = entry.inputs(entry.config, shape, dtype)
    return _called(model, entry), args, kwargs


@contextmanager
def building(device: torch.device | str, fake: bool) -> Iterator[None]:
    """Models and tensors made inside are on ``device``; with ``fake`` they are fake, of one FakeTensorMode."""
    if fake:
        with fake_on(device):
            yield
    else:
        with torch.device(device), torch.no_grad():
            yield


def placed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with all that it holds on the default device: some classes make a parameter from a list of numbers."""
    device = torch.get_default_device()
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for held in tables:
            for name, value in held.items():
                if value is not None and value.device != device:
                    moved = value.detach().to(device)
                    held[name] = Parameter(moved, value.requires_grad) if isinstance(value, Parameter) else moved
    return model


def small(
    name: str | Entry,
    *,
    dtype: torch.dtype = torch.float32,
    frames: int = 5,
    height: int = 24,
    width: int = 32,
    batch: int = 2,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Returns a model (or its method) of the same class with few channels and random weights, with its args and kwargs.

    `name` may be an entry itself. `height` and `width` are those of the latent. The same seed gives the same weights
    and inputs, on whatever device.
    """
    entry = name if isinstance(name, Entry) else _entry(name)
    config = {**entry.config, **entry.small}
    pixels = entry.shape.steps[1]
    shape = entry.shape.resized(frames=frames, height=height * pixels, width=width * pixels, batch=batch)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = _construct(entry, config, torch.float32)
        _randomise_constants(model)
        args, kwargs = entry.inputs(config, shape, dtype)
    # Not `model.to`, which diffusers answers with a warning.
    model = torch.nn.Module.to(model, device=device, dtype=dtype)
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    return _called(model, entry), args, kwargs


def _called(model: torch.nn.Module, entry: Entry) -> Callable[..., Any]:
    """What is called: the model, or another of its methods than `forward`."""
    return model if entry.method == "forward" else getattr(model, entry.method)


def _entry(name: str) -> Entry:
    if name not in CATALOGUE:
        raise KeyError(f"no model {name!r} in the catalogue; there are {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def _construct(entry: Entry, config: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    with default_dtype(dtype):
        model = placed(pkgutil.resolve_name(entry.class_path)(**config))
    return model.eval().requires_grad_(False)


def _randomise_constants(model: torch.nn.Module) -> None:
    """Gives random values to what initialisation left constant and training would not.

    A projection of zeros takes its whole branch out of the output, and a norm's ones and zeros hide its scale and
    shift: a test on such weights would pass whatever became of them. `mix_factor` weighs the spatial against the
    temporal branch; around 0 its sigmoid gives both about half.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("mix_factor"):
            parameter.normal_()
        elif parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif (parameter == parameter.flatten()[0]).all():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
