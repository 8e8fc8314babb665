"""The benchmark: peak memory, time and equality of a video UNet and a video decoder on the CPU, run in several ways.

One process; every round runs each way once, and a way's time is the median over rounds of its ratio to eager in the
same round, so that a machine that slows down slows all of them. Peaks come from runs of their own.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

import fxstream
from fxstream.passes.capture import Inputs, capture
from fxstream.passes.liveness import profile
from fxstream.passes.normalize import normalize
from fxstream.tools import catalogue
from fxstream.tools.measure import measure_peak

MIB = 2**20
BUDGETS = (0.75, 0.5, "min")


@dataclass
class Variant:
    """One way to run the model: ``run`` takes its inputs, within ``setting``."""

    name: str
    run: Callable[..., Any]
    predicted_bytes: int | None = None
    setting: Callable[[], AbstractContextManager[None]] = nullcontext
    peak_bytes: int = 0
    relative_l2: float = 0.0
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each way (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small models, to see that all of it works")
    parser.add_argument("--model", choices=("unet", "decoder"), help="one of the two alone")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in [options.model] if options.model else ["unet", "decoder"]:
        model, args, kwargs = unet(options.quick) if name == "unet" else _decoder(options.quick)
        module = getattr(model, "__self__", model)
        shape = " x ".join(map(str, args[0].shape))
        widths = module.config.block_out_channels
        print(f"\n{type(module).__name__} {widths}, latents {shape}, float32, {options.rounds} rounds\n")
        print(_bench(model, args, kwargs, options.rounds))


def _bench(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rounds: int) -> str:
    variants = list(_variants(model, args, kwargs))
    _measure(variants, args, kwargs)
    for number in range(rounds):
        _say(f"round {number + 1} of {rounds}")
        for variant in variants:
            with variant.setting():
                began = time.perf_counter()
                variant.run(*args, **kwargs)
                variant.seconds.append(time.perf_counter() - began)
    return _table(variants)


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The distance of two tensors over the length of the second, in float64."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())


def unet(quick: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A UNet of Stable Video Diffusion's structure; in full, some 5 s a forward on two cores."""
    if quick:
        return catalogue.small("svd-unet", frames=4, batch=1)
    widths = {"block_out_channels": (96, 192, 384, 384), "num_attention_heads": (2, 4, 8, 8)}
    entry = replace(catalogue.SVD, small={**catalogue.SVD.small, **widths})
    return catalogue.small(entry, frames=14, height=32, width=48, batch=2)


def _decoder(quick: bool) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A decoder of Stable Video Diffusion's structure; in full, some 5 s a call on two cores."""
    if quick:
        return catalogue.small("svd-vae", frames=4, batch=1)
    widths = {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2}
    entry = replace(catalogue.SVD_VAE, small=widths)
    return catalogue.small(entry, frames=8, height=24, width=32, batch=1)


def _variants(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Variant]:
    yield Variant("eager", model)
    _say("capturing")
    captured = capture(model, args, kwargs)
    graph_module = normalize(captured.graph_module)

    def run_graph(*args: Any, **kwargs: Any) -> Any:
        return captured.result(graph_module(*Inputs.of(args, kwargs).tensors))

    yield Variant("captured graph", run_graph, profile(graph_module).peak_bytes)
    for budget in BUDGETS:
        _say(f"planning for {budget}")
        streamed = fxstream.optimize(model, budget, args, kwargs)
        yield Variant(f"fxstream, {budget}", streamed, streamed.plans[0].after.peak_bytes)
    for dim in (0, 1) if hasattr(model, "enable_forward_chunking") else ():
        yield Variant(f"forward chunking, dim {dim}", model, setting=partial(_forward_chunking, model, dim))


@contextmanager
def _forward_chunking(model: Any, dim: int) -> Iterator[None]:
    """Diffusers' own way to save memory: feed-forward layers run in chunks of one frame (dim 0) or token (dim 1)."""
    blocks = [module for module in model.modules() if hasattr(module, "set_chunk_feed_forward")]
    settings = [(block._chunk_size, block._chunk_dim) for block in blocks]
    model.enable_forward_chunking(chunk_size=1, dim=dim)
    try:
        yield
    finally:  # not every model has disable_forward_chunking
        for block, (size, axis) in zip(blocks, settings, strict=True):
            block._chunk_size, block._chunk_dim = size, axis


def _measure(variants: list[Variant], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Peaks and results; also each way's first run, which is not timed."""
    reference = None
    for variant in variants:
        _say(f"measuring {variant.name}")
        with variant.setting():
            measured = measure_peak(variant.run, *args, **kwargs)
        (result,) = measured.result
        reference = result if reference is None else reference
        variant.peak_bytes, variant.relative_l2 = measured.peak_bytes, relative_l2(result, reference)


def _table(variants: list[Variant]) -> str:
    eager = variants[0]
    rows = []
    for variant in variants:
        ratio = statistics.median(a / b for a, b in zip(variant.seconds, eager.seconds, strict=True))
        predicted = "" if variant.predicted_bytes is None else f"{variant.predicted_bytes / MIB:.2f}"
        seconds = statistics.median(variant.seconds)
        share = f"{variant.peak_bytes / eager.peak_bytes:.0%}"
        peak = f"{variant.peak_bytes / MIB:.2f}"
        rows.append(
            [variant.name, peak, predicted, share, f"{seconds:.2f}", f"{ratio:.2f}", f"{variant.relative_l2:.1e}"]
        )
    headers = ["", "peak MiB", "predicted MiB", "of eager", "seconds", "time over eager", "relative L2"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 6))


def processor() -> str:
    """The processor's name, where Linux tells."""
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.machine()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
