"""A procedural data set of video clips: one coloured shape that slides, bounces or turns on a dark ground.

A clip is 8 frames of 32 x 32 pixels, labelled by its shape, motion and colour. Shapes are upright; those that turn
begin so. `quality` tells such clips from others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FRAMES, SIZE = 8, 32
SHAPES = ("disc", "square", "triangle", "cross")
MOTIONS = ("slide", "bounce", "turn")
COLOURS = torch.tensor([[1, -1, -1], [-1, 1, -1], [-0.6, -0.2, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]])
"""Red, green, blue, yellow, magenta and cyan, each channel in [-1, 1]."""

GROUND = -0.9
RADII = (6.0, 8.0)
SHARPNESS = 2.0
TURN = math.pi / 8
"""The angle by which a shape turns from one frame to the next, one way or the other."""


@dataclass(frozen=True)
class Clips:
    """Clips of shape (count, frames, 3, size, size) in [-1, 1], and each one's shape, motion and colour as indices."""

    video: torch.Tensor
    shape: torch.Tensor
    motion: torch.Tensor
    colour: torch.Tensor


def draw(count: int, generator: torch.Generator) -> Clips:
    """Draw clips of all labels at random."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    motion = torch.randint(len(MOTIONS), (count,), generator=generator)
    colour = torch.randint(len(COLOURS), (count,), generator=generator)
    radius = uniform(*RADII)
    time = torch.arange(FRAMES, dtype=torch.float32)

    # A slide stays within the frame: the middle of its way lies in what the way leaves of the frame.
    heading, speed = uniform(0, 2 * math.pi), uniform(1.0, 1.8)
    velocity = speed[:, None] * torch.stack([heading.cos(), heading.sin()], dim=1)
    room = (SIZE / 2 - radius)[:, None] - velocity.abs() * (FRAMES - 1) / 2
    middle = SIZE / 2 + room.clamp(min=0) * uniform(-1, 1, 2)
    slide = middle[:, None] + velocity[:, None] * (time - (FRAMES - 1) / 2)[None, :, None]

    # A bounce goes on along a straight line that walls fold back; it is fast enough to meet one.
    signs = torch.where(uniform(-1, 1, 2) < 0, -1.0, 1.0)
    way = (SIZE - 2 * radius)[:, None, None]
    line = uniform(0, 1, 2)[:, None] * way + (signs * uniform(2.9, 3.5, 2))[:, None] * time[None, :, None]
    bounce = radius[:, None, None] + way - (line % (2 * way) - way).abs()

    # A turn goes round a small circle, the shape about itself as well.
    turned = torch.where(uniform(-1, 1) < 0, -TURN, TURN)[:, None] * time
    phase = uniform(0, 2 * math.pi)[:, None] + turned
    room = (SIZE / 2 - radius - 4)[:, None]
    turn = (SIZE / 2 + room * uniform(-1, 1, 2))[:, None] + 4 * torch.stack([phase.cos(), phase.sin()], dim=2)

    centre = torch.stack([slide, bounce, turn])[motion, torch.arange(count)]
    angle = torch.where((motion == MOTIONS.index("turn"))[:, None], turned, 0.0)
    inside = _inside(shape, centre, angle, radius)[:, :, None]
    return Clips(GROUND + inside * (COLOURS[colour][:, None, :, None, None] - GROUND), shape, motion, colour)


def _inside(shape: torch.Tensor, centre: torch.Tensor, angle: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """How much of each pixel (count, frames, size, size) lies in the shape, in [0, 1], by its distance to the edge."""
    pixel = torch.arange(SIZE) + 0.5
    x = pixel[None, None, None, :] - centre[:, :, 0, None, None]
    y = pixel[None, None, :, None] - centre[:, :, 1, None, None]
    cos, sin = angle.cos()[:, :, None, None], angle.sin()[:, :, None, None]
    x, y = x * cos + y * sin, y * cos - x * sin
    r = radius[:, None, None, None]
    a, b = x.abs(), y.abs()
    disc = r * 0.9 - (x**2 + y**2).sqrt()
    square = r * 0.75 - torch.maximum(a, b)
    triangle = torch.minimum(r * 0.5 + y, r * 0.5 - y * 0.5 - a * math.sqrt(3) / 2)
    bar = r * 0.3
    cross = torch.maximum(torch.minimum(bar - a, r - b), torch.minimum(bar - b, r - a))
    edges = torch.stack([disc, square, triangle, cross])[shape, torch.arange(len(shape))]
    return (edges * SHARPNESS / 2 + 0.5).clamp(0, 1)
