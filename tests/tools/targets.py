"""Functions that a command can be pointed at."""

from __future__ import annotations

import torch
from torch import nn

from tests.passes.programs import Network, example


def nested():
    """A network that is streamed by loops within a loop, at the lowest budget."""
    torch.manual_seed(0)
    return Network(("spatial", "temporal", "feedforward"), 0), (example(0),), {}


def feedforward(frames: int = 64, dtype: torch.dtype = torch.float32):
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)).requires_grad_(False)
    return model.to(dtype), (torch.ones(frames, 16, dtype=dtype),), {}


def at_most_100(frames: int = 64):
    model, args, kwargs = feedforward(frames)
    if frames > 100:
        raise ValueError("more than 100 frames")
    return model, args, kwargs


def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    return Branching(), (torch.ones(4),), {}


def broken():
    raise ValueError("no\nluck")


def leaving():
    raise SystemExit(3)


def a_number():
    return 3


def no_model():
    return 3, (), {}


not_a_function = 3


def on_meta():
    model, args, kwargs = feedforward()
    return model.to("meta"), tuple(x.to("meta") for x in args), kwargs


def sized(frames: int = 2, height: int = 64, width: int = 64):
    model, _, _ = feedforward()
    return model, (torch.ones(frames, height * width // 64, 16),), {}


def video(frames: int = 2, height: int = 64, width: int = 64, dtype: torch.dtype = torch.float32):
    """A model of a video by the options that say its size and type."""
    model, _, _ = feedforward(dtype=dtype)
    return model, (torch.ones(frames, height * width // 64, 16, dtype=dtype),), {}
