"""Prices: what a launch, a byte and a floating point operation cost on this machine, measured in some seconds.

Each price is the least of several runs: what else a machine does can only make one longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from fxstream.passes.machine.cost import CPU, CUDA, CostModel

WORKING_SETS = (1 << 20, 4 << 20, 16 << 20, 48 << 20)
"""Bytes that a kernel reads and writes at once, from what fits a core's cache to what fits none; past the last, twice
that is measured."""

RUNS = 7


def measure_prices(device: torch.device, progress: Callable[[str], None] = lambda _: None) -> CostModel:
    """The prices of a device, measured on it now."""
    defaults = CPU if device.type == "cpu" else CUDA
    small = torch.zeros(16, device=device)
    progress("launch")
    launch = _seconds(lambda: small.add(1), device, calls=200)
    rates = []
    for size in (*WORKING_SETS, 2 * WORKING_SETS[-1]):
        progress(f"memory, {size >> 20} MiB at once")
        x = torch.zeros(size // 8, device=device)
        calls = max(1, (64 << 20) // size)
        rates.append(max(1e-15, (_seconds(partial(x.add, 1), device, calls=calls) - launch) / size))
    progress("products")
    flop, reduced_flop = (_product(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    progress("convolutions")
    fast, slow = _convolutions(device)
    return replace(
        defaults,
        launch=launch,
        rates=tuple(zip(WORKING_SETS, rates[:-1], strict=True)),
        beyond=rates[-1],
        flop=flop,
        reduced_flop=reduced_flop,
        slow_flop=max(0.0, slow - fast) if device.type == "cpu" else 0.0,
    )


def _product(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds a floating point operation in a product of matrices."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.zeros(size, size, device=device, dtype=dtype)
    return _seconds(lambda: a @ a, device, calls=4) / (2 * size**3)


def _convolutions(device: torch.device) -> tuple[float, float]:
    """Seconds a floating point operation in a convolution of two samples, and of one small one."""
    weight = torch.zeros(64, 64, 3, 3, device=device)
    pair, one = torch.zeros(2, 64, 16, 18, device=device), torch.zeros(1, 64, 16, 18, device=device)
    each = 2 * 64 * 64 * 9 * 16 * 18
    return tuple(  # type: ignore[return-value]
        _seconds(partial(torch.conv2d, x, weight, padding=1), device, calls=4) / (each * x.shape[0])
        for x in (pair, one)
    )


@torch.no_grad()
def _seconds(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """The least time of a call."""
    run()
    best = float("inf")
    for _ in range(RUNS):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
