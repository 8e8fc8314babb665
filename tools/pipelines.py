"""Whole pipelines at their published size, as data: each component's class and configuration, and the default call.

`build` gives a pipeline whose weights are fake, so that all of it can be planned without a download or memory. It is
called with what its encoders would make of a text, which takes no tokenizer.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxstream.fake import fake_on
from fxstream.pipeline.rehearsal import fake_copies
from fxstream.tools.catalogue import ANIMATEDIFF, SVD, SVD_XT, Entry


@dataclass(frozen=True)
class Component:
    """A module of a pipeline. With `config_class_path` the class is one of transformers', built from that."""

    class_path: str
    config: Mapping[str, Any]
    config_class_path: str | None = None

    def build(self) -> Any:
        """The component, with weights as the current mode and default dtype make them."""
        kind = pkgutil.resolve_name(self.class_path)
        if self.config_class_path is None:
            return kind(**self.config)
        return kind(pkgutil.resolve_name(self.config_class_path)(**self.config))


def _of(entry: Entry) -> Component:
    return Component(entry.class_path, entry.config)


@dataclass(frozen=True)
class PipelineEntry:
    """One pipeline: `modules` have weights, `others` have none; `inputs(dtype)` is what the call needs beside `call`.

    `source` is the repository on Hugging Face; a component's configuration is the `config.json` of its folder there.
    """

    name: str
    class_path: str
    source: str
    modules: Mapping[str, Component]
    others: Mapping[str, tuple[str, Mapping[str, Any]] | None]
    call: Mapping[str, Any]
    inputs: Callable[[torch.dtype], dict[str, Any]] = field(default=lambda dtype: {})


KL_WIDTHS = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
DOWN_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4}

SVD_PIPELINE = PipelineEntry(
    name="svd",
    class_path="diffusers:StableVideoDiffusionPipeline",
    source="stabilityai/stable-video-diffusion-img2vid",
    modules={
        # CLIP ViT-H/14
        "image_encoder": Component(
            "transformers:CLIPVisionModelWithProjection",
            {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "projection_dim": 1024,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
                "hidden_act": "gelu",
            },
            "transformers:CLIPVisionConfig",
        ),
        "unet": _of(SVD),
        "vae": Component(
            "diffusers:AutoencoderKLTemporalDecoder",
            KL_WIDTHS | DOWN_BLOCKS | {"sample_size": 768, "scaling_factor": 0.18215, "force_upcast": True},
        ),
    },
    others={
        "scheduler": (
            "diffusers:EulerDiscreteScheduler",
            {
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "prediction_type": "v_prediction",
                "use_karras_sigmas": True,
                "timestep_type": "continuous",
                "timestep_spacing": "leading",
                "sigma_min": 0.002,
                "sigma_max": 700.0,
                "steps_offset": 1,
            },
        ),
        "feature_extractor": ("transformers:CLIPImageProcessor", {}),
    },
    call={"height": 576, "width": 1024, "num_frames": 14},
)

SVD_XT_PIPELINE = replace(
    SVD_PIPELINE,
    name="svd-xt",
    source="stabilityai/stable-video-diffusion-img2vid-xt",
    modules={**SVD_PIPELINE.modules, "unet": _of(SVD_XT)},
    call={"height": 576, "width": 1024, "num_frames": 25},
)


def text_inputs(dtype: torch.dtype) -> dict[str, Any]:
    """What CLIP ViT-L/14 makes of a prompt and of the empty one: 77 tokens of 768 channels each."""
    return {name: torch.zeros(1, 77, 768, dtype=dtype) for name in ("prompt_embeds", "negative_prompt_embeds")}


ANIMATEDIFF_PIPELINE = PipelineEntry(
    name="animatediff",
    class_path="diffusers:AnimateDiffPipeline",
    source="Stable Diffusion 1.5, with guoyww/animatediff-motion-adapter-v1-5-2",
    modules={
        "text_encoder": Component(
            "transformers:CLIPTextModel",
            {
                "vocab_size": 49408,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "max_position_embeddings": 77,
            },
            "transformers:CLIPTextConfig",
        ),
        "unet": _of(ANIMATEDIFF),
        "vae": Component(
            "diffusers:AutoencoderKL", KL_WIDTHS | DOWN_BLOCKS | {"up_block_types": ("UpDecoderBlock2D",) * 4}
        ),
    },
    # The motion adapter's weights are the UNet's once it is built.
    others={
        "tokenizer": None,
        "motion_adapter": None,
        "scheduler": ("diffusers:DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False}),
    },
    call={"height": 576, "width": 1024, "num_frames": 16},
    inputs=text_inputs,
)

PIPELINES = {entry.name: entry for entry in (SVD_PIPELINE, SVD_XT_PIPELINE, ANIMATEDIFF_PIPELINE)}


def build(name: str, dtype: torch.dtype = torch.float16) -> tuple[Any, dict[str, Any]]:
    """Returns a pipeline with fake weights, and the arguments of its default call."""
    if name not in PIPELINES:
        raise KeyError(f"no pipeline {name!r} in the catalogue; there are {', '.join(PIPELINES)}")
    entry = PIPELINES[name]
    with fake_on("cpu", dtype) as mode:
        modules = {part: component.build().eval() for part, component in entry.modules.items()}
    modules = fake_copies(modules, mode)  # which can be cast and moved
    return made(entry, modules), {**entry.call, **entry.inputs(dtype)}


def made(entry: PipelineEntry, modules: Mapping[str, Any]) -> Any:
    """The pipeline of an entry around modules."""
    others = {part: each and pkgutil.resolve_name(each[0])(**each[1]) for part, each in entry.others.items()}
    return pkgutil.resolve_name(entry.class_path)(**modules, **others)
