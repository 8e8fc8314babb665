"""A small denoiser with skip connections, as quick to capture as to run, and generations with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 8


class Block(nn.Module):
    """A convolution that hears of the time, and attention over frames."""

    def __init__(self, wide: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, wide)
        self.conv = nn.Conv2d(wide, channels, 3, padding=1)
        self.embed = nn.Linear(CHANNELS, channels)
        self.shortcut = nn.Conv2d(wide, channels, 1)
        self.temporal = nn.Linear(channels, channels)

    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        x = self.shortcut(x) + F.silu(self.conv(self.norm(x)) + self.embed(time)[:, :, None, None])
        tokens = x.unflatten(0, (-1, frames)).permute(0, 3, 4, 1, 2)
        mixed = F.scaled_dot_product_attention(tokens, tokens, self.temporal(tokens))
        return x + mixed.permute(0, 3, 4, 1, 2).flatten(0, 1)


class Denoiser(nn.Module):
    """(batch, frames, channels, height, width), a time, and a label (batch, channels) -> the same shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        c = CHANNELS
        self.time = nn.Linear(1, c)
        self.first = nn.Conv2d(3, c, 3, padding=1)
        self.down_blocks = nn.ModuleList([Block(c, c), Block(c, 2 * c), Block(2 * c, 2 * c)])
        self.mid_block = Block(2 * c, 2 * c)
        self.up_blocks = nn.ModuleList([Block(4 * c, 2 * c), Block(4 * c, c), Block(2 * c, c)])
        self.last = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        batch, frames = sample.shape[:2]
        time = torch.tanh(self.time(timestep.float().reshape(-1, 1) / 1000)).expand(batch, -1)
        if label is not None:
            time = time + label
        time = time.repeat_interleave(frames, dim=0)
        x = self.first(sample.flatten(0, 1))
        skips = []
        for block in self.down_blocks:
            x = block(x, time, frames)
            skips.append(x)
            x = F.avg_pool2d(x, 2) if len(skips) < 3 else x
        x = self.mid_block(x, time, frames)
        for block in self.up_blocks:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:]) if x.shape[2:] != skip.shape[2:] else x
            x = block(torch.cat([x, skip], dim=1), time, frames)
        return self.last(F.silu(x)).unflatten(0, (batch, frames))


def latent(seed: int = 0, batch: int = 1) -> Tensor:
    """Noise to begin a generation from."""
    return torch.randn(batch, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def times(steps: int) -> list[Tensor]:
    """Timesteps, falling."""
    return [torch.tensor(1000.0 * (steps - step) / steps) for step in range(steps)]


def generate(
    model: Callable[..., Tensor], steps: int = 6, seed: int = 0, labels: Sequence[Tensor | None] = (None,)
) -> Tensor:
    """A generation, with one call a label at each step."""
    x = latent(seed)
    with torch.no_grad():
        for time in times(steps):
            x = x - sum(model(x, time, label) for label in labels) / (steps * len(labels))
    return x
