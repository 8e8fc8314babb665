"""Compares diffusers' own memory switches with fxstream: peaks by the allocator, and what becomes of the output.

Run with `make comparison`. Four models of published structures, with few channels and random weights, run on the CPU in
float32: as they are, with each switch that their class has, and streamed. Last it counts diffusers' classes by switch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from tabulate import tabulate

import fxstream
from fxstream.tools import catalogue
from fxstream.tools.bench import MIB, relative_l2
from fxstream.tools.measure import measure_peak

BUDGETS = (0.5, "min")
KINDS = ("unets", "transformers", "autoencoders")
"""Folders of diffusers' models."""

UNET = {"block_out_channels": (64, 128)}
VAE = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2}


@dataclass(frozen=True)
class Case:
    """A model and the size of its call; ``switches`` are names of ``SWITCHES``."""

    name: str
    widths: dict[str, Any]
    shape: dict[str, Any]
    switches: tuple[str, ...]

    def build(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The model, the same each time."""
        entry = catalogue.CATALOGUE[self.name]
        return catalogue.small(replace(entry, small={**entry.small, **self.widths}), **self.shape)


CASES = (
    Case(
        "svd-unet",
        {
            **UNET,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "num_attention_heads": (2, 4),
        },
        {"frames": 6, "height": 16, "width": 24},
        ("forward chunking, dim 0", "forward chunking, dim 1"),
    ),
    Case(
        "modelscope-unet",
        {
            **UNET,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "attention_head_dim": 32,
        },
        {"frames": 6, "height": 16, "width": 24},
        ("attention slicing", "forward chunking, dim 0", "forward chunking, dim 1"),
    ),
    Case("svd-vae", VAE, {"frames": 8, "height": 16, "width": 24, "batch": 1}, ("chunks of 4 frames", "single frames")),
    Case("sd-vae", VAE, {"frames": 3, "height": 40, "width": 56, "batch": 1}, ("slicing", "tiling")),
)


def main() -> None:
    torch.set_grad_enabled(False)
    for case in CASES:
        model, args, _ = case.build()
        module = getattr(model, "__self__", model)
        shape = " x ".join(map(str, args[0].shape))
        print(f"\n{case.name}: {type(module).__name__} {module.config.block_out_channels}, latents {shape}, float32\n")
        print(_table(case), flush=True)
    print(f"\nClasses of diffusers {diffusers.__version__} by the switches that they have\n")
    print(_classes())


def _table(case: Case) -> str:
    rows: list[list[str]] = []
    reference, peak = None, 0
    for name, (run, args, kwargs) in _ways(case):
        print(f"measuring {case.name}, {name}", file=sys.stderr, flush=True)
        measured = measure_peak(run, *args, **kwargs)
        (result,) = measured.result
        reference, peak = (result, measured.peak_bytes) if reference is None else (reference, peak)
        share = f"{measured.peak_bytes / peak:.0%}"
        rows.append([name, f"{measured.peak_bytes / MIB:.2f}", share, f"{relative_l2(result, reference):.1e}"])
    headers = ["", "peak MiB", "of as it is", "relative L2"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 3))


def _ways(case: Case) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each way to run the model: what is called, with which arguments."""
    yield "as it is", case.build()
    for switch in case.switches:
        model, args, kwargs = case.build()
        yield switch, (SWITCHES[switch](model), args, kwargs)
    for budget in BUDGETS:
        model, args, kwargs = case.build()
        yield f"fxstream, {budget}", (fxstream.optimize(model, budget, args, kwargs), args, kwargs)


def _forward_chunking(dim: int, model: Any) -> Callable[..., Any]:
    """Feed-forward layers in chunks of one."""
    model.enable_forward_chunking(chunk_size=1, dim=dim)
    return model


def _attention_slicing(model: Any) -> Callable[..., Any]:
    """One head at a time, as the pipeline's `enable_attention_slicing("max")`."""
    model.set_attention_slice("max")
    return model


def _tiling(decode: Any) -> Callable[..., Any]:
    decode.__self__.enable_tiling()
    return decode


def _slicing(decode: Any) -> Callable[..., Any]:
    decode.__self__.enable_slicing()
    return decode


def _in_chunks(size: int, decode: Any) -> Callable[..., Any]:
    """As the pipeline's `decode_chunk_size` does it."""

    def run(latents: torch.Tensor, num_frames: int, **kwargs: Any) -> tuple[torch.Tensor]:
        return (torch.cat([decode(part, num_frames=len(part), **kwargs)[0] for part in latents.split(size)]),)

    return run


SWITCHES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "attention slicing": _attention_slicing,
    "forward chunking, dim 0": partial(_forward_chunking, 0),
    "forward chunking, dim 1": partial(_forward_chunking, 1),
    "chunks of 4 frames": partial(_in_chunks, 4),
    "single frames": partial(_in_chunks, 1),
    "slicing": _slicing,
    "tiling": _tiling,
}
"""Name -> turns a switch of a model, or of the one whose `decode` it is given, and returns what is to be called."""


def _classes() -> str:
    """How many of the classes in each folder of diffusers' models have a switch."""
    offers: dict[str, Callable[[type], bool]] = {
        "attention slicing": lambda kind: hasattr(kind, "set_attention_slice"),
        "forward chunking": lambda kind: hasattr(kind, "enable_forward_chunking"),
        "tiling": lambda kind: "self.use_tiling = " in inspect.getsource(kind),
        "slicing": lambda kind: "self.use_slicing = " in inspect.getsource(kind),
    }
    rows = []
    for folder in KINDS:
        found = _models(folder)
        rows.append([folder, len(found), *(sum(map(offered, found)) for offered in offers.values())])
    return tabulate(rows, ["", "classes", *offers], tablefmt="github")


def _models(folder: str) -> list[type]:
    kinds = (getattr(diffusers, name) for name in dir(diffusers) if name[0].isupper())
    models = (kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, ModelMixin))
    return [kind for kind in models if kind.__module__.startswith(f"diffusers.models.{folder}.")]


if __name__ == "__main__":
    main()
