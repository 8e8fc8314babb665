"""Cost: estimated time of running nodes whole or in slices.

Slicing changes six things, and only these are modelled: launches (one for each node and slice), whole tensors read
again by each slice (weights, mostly), short runs of contiguous bytes where a slice is cut across the memory's order,
what neighbouring slices both compute, convolutions for which small slices take a slower kernel, and the price of memory
traffic, which is lower where a slice's working set stays in cache and in memory that the allocator has at hand. All
other arithmetic is the same either way and is left out.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from fxstream.passes.machine.kept import folder, machine_name, slug

aten = torch.ops.aten

REDUCED = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CostModel:
    """Prices of one kind of device.

    ``launch``: seconds a kernel launch. ``rates``: (working set in bytes, seconds a byte of traffic), the rate of the
    first entry at least as large; ``beyond`` past the last. ``short_run``: bytes that have to lie together for memory
    to be read at its full rate. ``flop``: seconds a floating point operation, ``reduced_flop`` one of a reduced type,
    ``slow_flop`` those more in a kernel that only small slices take. ``most_slices``: more are not worth what they
    save, unless each still moves ``least_traffic`` bytes.
    """

    launch: float
    rates: tuple[tuple[int, float], ...]
    beyond: float
    short_run: int
    flop: float
    reduced_flop: float
    slow_flop: float
    most_slices: int
    least_traffic: int

    def stride_factor(self, run: float) -> float:
        """How many times more it costs, above the first, to move bytes that lie ``run`` together."""
        return max(0.0, self.short_run / run - 1) if run else 0.0

    def flop_of(self, dtype: torch.dtype) -> float:
        """Seconds a floating point operation of that type."""
        return self.reduced_flop if dtype in REDUCED else self.flop

    def rate(self, working_set: float) -> float:
        """Seconds a byte of traffic, for a working set in bytes."""
        index = bisect_left(self.rates, (working_set, 0.0))
        return self.rates[index][1] if index < len(self.rates) else self.beyond


CPU = CostModel(
    launch=20e-6,
    rates=((4 << 20, 0.04e-9), (48 << 20, 0.05e-9)),
    beyond=0.17e-9,
    short_run=1024,
    flop=8e-12,
    reduced_flop=8e-12,
    slow_flop=8e-12,
    most_slices=64,
    least_traffic=8 << 20,
)
"""Measured on two cores with 2 MiB of L2 each; past some 16 MiB a tensor is mapped afresh, and its pages fault."""

CUDA = CostModel(
    launch=8e-6,
    rates=(),
    beyond=1.1e-12,
    short_run=64,
    flop=1.4e-14,
    reduced_flop=7e-15,
    slow_flop=0.0,
    most_slices=64,
    least_traffic=64 << 20,
)
"""From what is published of a GeForce RTX 4090: 1,008 GB/s, 82.6 TFLOP/s in float32 and 165.2 in float16 with float32
accumulation, memory read in sectors of 32 bytes, two at a time. That slices find one another in the L2 cache is not
counted on. A launch with what Python does for it is an estimate. Nothing of it was measured."""


def cost_model(device: torch.device) -> CostModel:
    """The prices for a device: those measured on it, if they were, else such as other machines have."""
    return kept_prices(device.type) or (CPU if device.type == "cpu" else CUDA)


def prices_file(device: str) -> Path:
    """Where the prices of this machine's device of that type are kept."""
    return folder() / "prices" / f"{slug(machine_name(device))}.json"


def save_prices(device: str, prices: CostModel) -> None:
    """Keep prices, in place of any that were."""
    path = prices_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(json.dumps({"machine": machine_name(device), **asdict(prices)}, indent=1))
    written.replace(path)


def kept_prices(device: str) -> CostModel | None:
    """The prices that were measured on this machine, if they were."""
    try:
        found = json.loads(prices_file(device).read_text())
        del found["machine"]
        return CostModel(**{**found, "rates": tuple((size, rate) for size, rate in found["rates"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def convolves_plainly(target: Any, args: Sequence[Any], shape: Sequence[int]) -> bool:
    """Whether a convolution of a part of its input, of that shape, takes the slow kernel that torch has on the CPU.

    This is torch's own choice between oneDNN and its plain kernels (`use_mkldnn` of ATen's Convolution.cpp).
    """
    if target not in CONVOLUTIONS or args[0].device.type != "cpu":
        return False
    given: tuple[Any, ...] = (*args, *(None, 1, 0, 1, 1)[len(args) - 2 :])
    input, weight, _, stride, _, dilation, groups = given
    if input.dtype in REDUCED:
        return not _in_onednn(input.dtype)
    if input.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return True
    steps = [step for each in (stride, dilation) for step in (each if isinstance(each, Sequence) else (each,))]
    height, width = (1, *weight.shape[2:])[-2:]
    batch = shape[0]
    pays = max(*steps, height, width) > 1 or batch >= 16 or torch.get_num_threads() > 1
    return not (pays and (groups > 1 or min(height, width) > 3 or batch > 1 or prod(shape[:4]) > 20480))


def computes_plainly(dtype: torch.dtype) -> bool:
    """Whether the CPU's products and convolutions of a reduced type are torch's own, which are slow."""
    return dtype in REDUCED and not _in_onednn(dtype)


@cache
def _in_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a reduced type on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()
