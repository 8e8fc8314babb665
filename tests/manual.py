"""The manual as data: its pages' blocks of code, and small stand-ins for what the pages take as given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn import functional as F

from tests import denoiser
from tests.fxstream.pipeline.pipelines import Codec, image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
FENCE = re.compile(r"( *)```(.*)")


@dataclass(frozen=True)
class Block:
    """A block of code: ``line`` is its first in the page, ``not_run`` why it does not run here ("": it does)."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def compiled(self) -> Any:
        """As Python, with the lines of the page in its tracebacks."""
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec")


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order. An indented one has the language "indented"."""
    lines = page.read_text().splitlines()
    before, reason, number = "", "", 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if fence := FENCE.fullmatch(line):
            begin, indent = number, len(fence[1])
            while not lines[number].strip().startswith("```"):
                number += 1
            code = "\n".join(each[indent:] for each in lines[begin:number])
            yield Block(page, begin + 1, fence[2], code, reason)
            number += 1
        elif line.startswith("    ") and not before.strip():
            yield Block(page, number, "indented", line, "")
        if line.strip():
            note = NOT_RUN.fullmatch(line.strip())
            reason = note[1] if note else ""
        before = line


class SmallUNet(denoiser.Denoiser):
    """A denoiser of three blocks, with what pipelines ask of theirs."""

    def __init__(self) -> None:
        super().__init__()
        channels = denoiser.CHANNELS
        self.down_blocks = nn.ModuleList([denoiser.Block(channels, 2 * channels)])
        self.up_blocks = nn.ModuleList([denoiser.Block(4 * channels, channels)])

    @property
    def device(self) -> torch.device:
        return self.first.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.first.weight.dtype


class SmallPipeline(DiffusionPipeline):
    """A video pipeline of no published class, which makes a small video whatever is asked of it."""

    model_cpu_offload_seq = "unet->vae"

    def __init__(self, unet: nn.Module, vae: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        height: int = 16,
        width: int = 16,
        num_frames: int = 4,
        num_inference_steps: int = 4,
        generator: Any = None,
    ) -> Any:
        height, width, num_frames = min(height, 64), min(width, 64), min(num_frames, 16)
        shape = 1, num_frames, 3, height // 2, width // 2
        latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps)
        for step in self.scheduler.timesteps:
            latents = self.scheduler.step(self.unet(latents, step), step, latents).prev_sample
        frames = self.vae.decode(F.pad(latents[0], (0, 0, 0, 0, 0, 1))).sample
        self.maybe_free_model_hooks()
        return SimpleNamespace(frames=frames)


def small_pipeline(*_: Any, **__: Any) -> SmallPipeline:
    """The stand-in for a pipeline, whatever is asked for."""
    torch.manual_seed(0)
    unet = SmallUNet().eval().requires_grad_(False)
    pipeline = SmallPipeline(unet, Codec().eval().requires_grad_(False), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def given() -> dict[str, Any]:
    """What pages take as given."""
    pipe = small_pipeline()
    return {
        "pipe": pipe,
        "unet": pipe.unet,
        "decoder": pipe.vae,
        "image": image(16, 16),
        "sample": denoiser.latent(),
        "timestep": torch.tensor(500.0),
        "latents": torch.zeros(4, 4, 32, 32),
        "model": pipe.unet,
        "args": (denoiser.latent(), torch.tensor(500.0)),
        "kwargs": {},
        "generate": denoiser.generate,
    }
