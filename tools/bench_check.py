"""The benchmark of the check at each call: whether the call, and the model, are as when it was planned.

``prepare`` of a call that is planned already does that check and no more. It is held against the model's own forward,
for a small UNet of three hundred modules. Both take turns, and the medians are shown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from tabulate import tabulate

import fxstream
from fxstream.tools.bench import processor


def small_unet() -> UNet2DConditionModel:
    """Two resolutions, self and cross attention."""
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    return unet.eval().requires_grad_(False)


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    unet = small_unet()
    args = torch.randn(2, 4, 32, 32), torch.tensor(5), torch.randn(2, 7, 32)
    streamed = fxstream.optimize(unet, 0.9, args)
    with torch.no_grad():
        turns = [(seconds(unet, *args), seconds(streamed.prepare, *args)) for _ in range(rounds)]
    forward, check = (median(times) for times in zip(*turns, strict=True))
    modules, weights = len([*unet.modules()]), len([*unet.parameters()])
    print(f"{processor()}, {torch.get_num_threads()} threads; {modules} modules, {weights} weights\n")
    rows = [("forward", f"{forward * 1e3:.2f}", ""), ("check", f"{check * 1e3:.2f}", f"{check / forward:.2%}")]
    print(tabulate(rows, headers=["", "ms", "of the forward"]))


if __name__ == "__main__":
    main()
