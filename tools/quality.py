"""How much a clip is like those of `shapes`, in numbers: its colours, its shape's area, its motion.

Each number has a range that nearly all real clips lie in, which noise does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fxstream.tools.shapes import COLOURS, GROUND

NEAR = 0.35
"""A pixel is of a colour if no channel is further from it."""

# Of 500 real clips all lie in each range.
RANGES: Mapping[str, tuple[float, float]] = {
    "one colour": (0.6, 1.0),
    "area": (0.045, 0.18),
    "steady area": (0.0, 0.25),
    "motion": (0.5, 7.0),
}
"""The range of each number in which a clip passes."""


@dataclass(frozen=True)
class Quality:
    """The numbers of some clips, one tensor of one value a clip each.

    ``one_colour`` is the share of the pixels that are not ground, those of the shape's edge among them, that are of one
    and the same colour in all frames; ``area`` the mean share of a frame that is not ground; ``steady_area`` its
    standard deviation over frames, relative to it; ``motion`` the longest way, in pixels, that the middle of the shape
    goes from one frame to the next.
    """

    one_colour: torch.Tensor
    area: torch.Tensor
    steady_area: torch.Tensor
    motion: torch.Tensor

    def numbers(self) -> dict[str, torch.Tensor]:
        """By the names of ``RANGES``."""
        return dict(zip(RANGES, (self.one_colour, self.area, self.steady_area, self.motion), strict=True))

    def passed(self) -> dict[str, torch.Tensor]:
        """Whether each clip lies in each range, and "all" of them."""
        found = {
            name: (values >= RANGES[name][0]) & (values <= RANGES[name][1]) for name, values in self.numbers().items()
        }
        return found | {"all": torch.stack(list(found.values())).all(dim=0)}


def measure(video: torch.Tensor) -> Quality:
    """The numbers of clips (count, frames, 3, height, width) in [-1, 1]."""
    ground = (video - GROUND).abs().amax(dim=2) <= NEAR
    colours = COLOURS[:, None, None, None, :, None, None]
    of_colour = (video[None] - colours.squeeze(3)).abs().amax(dim=3) <= NEAR
    of_shape = of_colour.flatten(2).float().mean(dim=2).amax(dim=0)
    shape = (~ground).float()
    areas = shape.mean(dim=(2, 3))
    mass = shape.sum(dim=(2, 3)).clamp(min=1)
    height, width = video.shape[3:]
    x = (shape * torch.arange(width)).sum(dim=(2, 3)) / mass
    y = (shape * torch.arange(height)[:, None]).sum(dim=(2, 3)) / mass
    ways = torch.stack([x, y], dim=2).diff(dim=1).norm(dim=2)
    area = areas.mean(dim=1)
    return Quality(
        one_colour=of_shape / area.clamp(min=1e-6),
        area=area,
        steady_area=areas.std(dim=1) / area.clamp(min=1e-6),
        motion=ways.amax(dim=1),
    )
