"""The benchmark: peak memory, time and equality of a video UNet and a video decoder on the CPU, run in several ways.

Each way has a process of its own; every round runs each way once, and a way's time is the median over rounds of its
ratio to eager in the same round. Peaks come from runs of their own.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

import fxstream
from fxstream.passes.graph.call import Inputs
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.tools import catalogue
from fxstream.tools.measure import measure_peak
from fxstream.tools.turns import Turn, take_turns

MIB = 2**20
BUDGETS = (0.75, 0.5, "min")


EAGER, CAPTURED = "eager", "captured graph"
STREAMED = {f"fxstream, {budget}": budget for budget in BUDGETS}
CHUNKED = {f"forward chunking, dim {dim}": dim for dim in (0, 1)}


@dataclass
class Facts:
    """Of one way: its peak, what was predicted of it if anything was, and its result."""

    peak_bytes: int
    predicted_bytes: int | None
    result: Any


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each way (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small models, to see that all of it works")
    parser.add_argument("--model", choices=("unet", "decoder"), help="one of the two alone")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in [options.model] if options.model else ["unet", "decoder"]:
        model, args, _ = unet(options.quick) if name == "unet" else _decoder(options.quick)
        module = getattr(model, "__self__", model)
        shape = " x ".join(map(str, args[0].shape))
        widths = module.config.block_out_channels
        print(f"\n{type(module).__name__} {widths}, latents {shape}, float32, {options.rounds} rounds\n")
        chunked = CHUNKED if hasattr(model, "enable_forward_chunking") else ()
        names = [EAGER, CAPTURED, *STREAMED, *chunked]
        print(_table(take_turns(partial(_prepare, name, options.quick), names, options.rounds)))


def _prepare(model_name: str, quick: bool, way: str) -> tuple[Callable[[], Any], Facts]:
    torch.set_grad_enabled(False)
    model, args, kwargs = unet(quick) if model_name == "unet" else _decoder(quick)
    predicted_bytes, run = None, model
    if way == CAPTURED:
        captured = capture(model, args, kwargs)
        graph_module = normalize(captured.graph_module)
        predicted_bytes = profile(graph_module).peak_bytes

        def run(*args: Any, **kwargs: Any) -> Any:
            return captured.result(graph_module(*Inputs.of(args, kwargs).tensors))

    elif way in STREAMED:
        run = fxstream.optimize(model, STREAMED[way], args, kwargs)
        predicted_bytes = run.plans[0].after.peak_bytes
    elif way in CHUNKED:
        model.enable_forward_chunking(chunk_size=1, dim=CHUNKED[way])  # diffusers' own way to save memory
    measured = measure_peak(run, *args, **kwargs)
    [result] = measured.result
    return partial(run, *args, **kwargs), Facts(measured.peak_bytes, predicted_bytes, result.numpy())


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
    widths = {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2}
    entry = replace(catalogue.SVD_VAE, small=widths)
    height, width = (8, 8) if quick else (24, 32)
    return catalogue.small(entry, frames=8, height=height, width=width, batch=1)


def _table(turns: dict[str, Turn]) -> str:
    eager = turns[EAGER]
    rows = []
    for name, turn in turns.items():
        facts = turn.facts
        predicted = "" if facts.predicted_bytes is None else f"{facts.predicted_bytes / MIB:.2f}"
        distance = relative_l2(torch.from_numpy(facts.result), torch.from_numpy(eager.facts.result))
        rows.append(
            [
                name,
                f"{facts.peak_bytes / MIB:.2f}",
                predicted,
                f"{facts.peak_bytes / eager.facts.peak_bytes:.0%}",
                f"{turn.median:.2f}",
                f"{turn.over(eager):.2f}",
                f"{distance:.1e}",
            ]
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


if __name__ == "__main__":
    main()
