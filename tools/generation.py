"""The demo's model, and clips made with it: DDIM with classifier-free guidance, without text encoder or VAE.

The model works on pixels: two by two of them make one position of twelve channels (`pack`), which loses nothing and
leaves a quarter of the positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNetMotionModel
from torch import nn
from torch.nn import functional

from fxstream.tools.shapes import COLOURS, FRAMES, MOTIONS, SHAPES, SIZE

FOLDER = Path(__file__).with_name("demo_model")
PATCH = 2
LABELS = 16
"""Channels of a label: one a shape, one a motion, one for no label, one a colour, and two to spare."""

LABEL_SCALE = 4.0
GUIDANCE = 2.0

CONFIGURATION: dict[str, Any] = {
    "sample_size": SIZE // PATCH,
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "cross_attention_dim": LABELS,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": FRAMES,
    "norm_num_groups": 8,
    "use_motion_mid_block": True,
}


def load() -> nn.Module:
    """The trained model, ready to be run."""
    model: nn.Module = UNetMotionModel.from_pretrained(FOLDER, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    return model.eval().requires_grad_(False)


def noise_schedule() -> DDIMScheduler:
    """The schedule that the model was trained with: cosine, its output the velocity."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
        set_alpha_to_one=True,
    )


def pack(video: torch.Tensor) -> torch.Tensor:
    """(batch, frames, 3, size, size) -> (batch, 12, frames, size / 2, size / 2)."""
    return functional.pixel_unshuffle(video, PATCH).transpose(1, 2)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    return functional.pixel_shuffle(packed.transpose(1, 2), PATCH)


def label_embedding(
    shape: torch.Tensor, motion: torch.Tensor, colour: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """One token a frame (batch * frames, 1, channels); where a label is not ``kept``, that of no label."""
    label = torch.zeros(len(shape), LABELS)
    clip, none = torch.arange(len(shape)), len(SHAPES) + len(MOTIONS)
    label[clip, shape] = 1
    label[clip, len(SHAPES) + motion] = 1
    label[clip, none + 1 + colour] = 1
    label[~kept] = 0
    label[~kept, none] = 1
    return (LABEL_SCALE * label)[:, None].repeat_interleave(FRAMES, dim=0)


def label_of(seed: int) -> tuple[int, int, int]:
    """The shape, motion and colour of a seed's clip, as indices into ``SHAPES``, ``MOTIONS`` and ``COLOURS``."""
    return seed % len(SHAPES), seed // len(SHAPES) % len(MOTIONS), seed % len(COLOURS)


def generate(
    model: Callable[..., Any], seeds: Sequence[int], steps: int = 25, guidance: float = GUIDANCE
) -> torch.Tensor:
    """One clip for each seed -> (count, frames, 3, size, size) in [-1, 1]. Seeds go through the labels in turn.

    Both halves of classifier-free guidance are one call of ``model`` a step.
    """
    scheduler = noise_schedule()
    scheduler.set_timesteps(steps)
    labels = [label_of(seed) for seed in seeds]
    shape, motion, colour = (torch.tensor(index).repeat(2) for index in zip(*labels, strict=True))
    label = label_embedding(shape, motion, colour, torch.arange(2 * len(labels)) < len(labels))
    size = (3 * PATCH**2, FRAMES, SIZE // PATCH, SIZE // PATCH)
    clips = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            given, free = model(torch.cat([clips, clips]), timestep, label, return_dict=False)[0].chunk(2)
            guided = free + guidance * (given - free)
            # The noise is told from the clean clip as clipped: with the two at odds, colours drift.
            clips = scheduler.step(guided, timestep, clips, use_clipped_model_output=True).prev_sample
    return unpack(clips).clamp(-1, 1)
