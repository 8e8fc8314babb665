"""Random video-like networks: blocks that keep a (batch * frames, channels, height, width) tensor's shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, BATCH, FRAMES, HEIGHT, WIDTH = 16, 2, 3, 4, 6


class Spatial(nn.Module):
    """A residual block of 2-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.first = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class Temporal(nn.Module):
    """A 3-D convolution along the frames, its norm over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, CHANNELS)
        self.conv = nn.Conv3d(CHANNELS, CHANNELS, (3, 1, 1), padding=(1, 0, 0))
        self.mix = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        video = x.unflatten(0, (BATCH, FRAMES)).permute(0, 2, 1, 3, 4)
        video = video + self.conv(F.silu(self.norm(video)))
        mixed = video.permute(0, 2, 1, 3, 4).flatten(0, 1)
        return torch.lerp(x, mixed, torch.sigmoid(self.mix))


class Attention(nn.Module):
    """Self-attention over pixels, or over the frames of each pixel."""

    def __init__(self, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.temporal:
            tokens = x.unflatten(0, (BATCH, FRAMES)).permute(0, 3, 4, 1, 2).reshape(-1, FRAMES, CHANNELS)
        else:
            tokens = x.flatten(2).transpose(1, 2)
        normed = self.norm(tokens)
        q, k, v = (layer(normed).unflatten(2, (2, CHANNELS // 2)).transpose(1, 2) for layer in self.qkv)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + tokens
        if self.temporal:
            return out.view(BATCH, HEIGHT, WIDTH, FRAMES, CHANNELS).permute(0, 3, 4, 1, 2).flatten(0, 1)
        return out.transpose(1, 2).reshape(x.shape)


class FeedForward(nn.Module):
    """A gated feed-forward over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.wide, self.narrow = nn.Linear(CHANNELS, 8 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        value, gate = self.wide(self.norm(tokens)).chunk(2, dim=-1)
        return x + self.narrow(value * F.gelu(gate)).permute(0, 3, 1, 2)


class TokenFeedForward(nn.Module):
    """A gated feed-forward over (..., channels) by itself, which begins at a value of its own."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 0.5
        value, gate = self.wide(self.norm(x)).chunk(2, -1)
        return self.narrow(value * F.gelu(gate)) + x


class Skip(nn.Module):
    """Concatenates the network's first value, as an up path does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([x, skip], dim=1))


class Pyramid(nn.Module):
    """Down by a strided convolution and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1)
        self.up = nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + self.up(F.interpolate(self.down(x), scale_factor=2.0, mode="nearest"))


class Shift(nn.Module):
    """Rows that move down by one, as causal padding moves frames: a slice reads others than it stores."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(CHANNELS, 4 * CHANNELS, 1), nn.Conv2d(4 * CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        moved = F.pad(F.silu(self.wide(x)), (0, 0, 1, 0))[..., :-1, :]
        return x + self.narrow(F.silu(moved))


class Gate(nn.Module):
    """Norms over pixels by hand: channels gated by their mean, scaled by their length, divided by the deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(CHANNELS, 4 * CHANNELS, 1), nn.Conv2d(4 * CHANNELS, CHANNELS, 1)
        self.gate = nn.Conv2d(4 * CHANNELS, 4 * CHANNELS, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = F.silu(self.wide(x))
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        length = torch.linalg.vector_norm(y, 2, (2, 3), keepdim=True)
        y = y * (length / (length.mean(1, keepdim=True) + 1))
        return x + self.narrow(y / (y.var((1, 2, 3), keepdim=True) + 1).sqrt())


class Shuffle(nn.Module):
    """An operator that reorders frames, which no axis through them survives."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + x.unflatten(0, (BATCH, FRAMES)).roll(1, dims=1).flatten(0, 1)


BLOCKS = {
    "spatial": Spatial,
    "temporal": Temporal,
    "pixels": lambda: Attention(False),
    "frames": lambda: Attention(True),
    "feedforward": FeedForward,
    "skip": Skip,
    "pyramid": Pyramid,
    "shift": Shift,
    "gate": Gate,
    "shuffle": Shuffle,
}


class Network(nn.Module):
    """Blocks in a row."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(BLOCKS[name]() for name in names)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x = x * 0.5
        for block in self.blocks:
            x = block(x, first)
        return x, x.mean(dim=(2, 3))


def example(seed: int) -> Tensor:
    """An input of the networks, (batch * frames, channels, height, width)."""
    return torch.randn(BATCH * FRAMES, CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


class Branch(nn.Module):
    """A residual branch whose second norm has to see all of a convolution before any of its values is used."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.silu(norm(y)))
        return x + y
