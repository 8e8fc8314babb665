"""Exactness at size: a video decoder at full width, and an image decoder cut in tiles, against the whole.

The video decoder runs in float32 at several budgets; what it returns is held against the eager model's and against
float64, and its peak against the plan's. The image decoder runs in float64, where rounding hides no seam: cut along
rows and, inside those loops, along columns, it is compared pixel by pixel. Some minutes; seconds with ``--quick``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

import fxstream
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.planning.candidates import whole
from fxstream.passes.planning.grouping import Group, lengths_of
from fxstream.passes.planning.program import Program
from fxstream.passes.planning.runs import find_runs
from fxstream.passes.rewriting.slicing import Slicer
from fxstream.passes.rewriting.split_norms import split_norms
from fxstream.tools import catalogue
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak

WAYS: list[tuple[str | float, bool]] = [(0.5, False), ("min", False), ("min", True)]
"""Budgets, and whether values may be computed again."""

TILES = 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench_exact", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, to see that all of it works")
    parser.add_argument("--part", choices=("width", "seam"), help="one of the two alone")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.part != "seam":
        print(_width(options.quick), flush=True)
    if options.part != "width":
        print(_seam(32 if options.quick else 128), flush=True)


def _width(quick: bool) -> str:
    """A decode of 4 frames of 256x256 pixels by SVD's decoder, 128 to 512 channels wide."""
    entry = catalogue.SVD_VAE if quick else replace(catalogue.SVD_VAE, small={})
    size = 8 if quick else 32
    decode, args, kwargs = catalogue.small(entry, frames=4, height=size, width=size, batch=1)
    measured = measure_peak(decode, *args, **kwargs)
    [eager] = measured.result
    results, rows = [eager], [["eager", "", f"{measured.peak_bytes / 2**20:.1f}", "", ""]]
    for budget, again in WAYS:
        streamed = fxstream.optimize(decode, budget, args, kwargs, allow_recompute=again)
        planned = streamed.plans[0].after.peak_bytes
        measured = measure_peak(streamed, *args, **kwargs)
        results.extend(measured.result)
        sizes = (f"{size / 2**20:.1f}" for size in (planned, measured.peak_bytes))
        off, distance = f"{measured.peak_bytes / planned - 1:+.2%}", f"{relative_l2(results[-1], eager):.1e}"
        rows.append([f"{budget}, recompute" if again else f"{budget}", *sizes, off, distance])
        print(*rows[-1], file=sys.stderr, flush=True)
    exact = _in_float64(decode, args, kwargs)
    for row, frames in zip(rows, results, strict=True):
        row.append(f"{relative_l2(frames, exact):.1e}")
    headers = ["", "planned MiB", "measured MiB", "off", "L2 to eager", "L2 to float64"]
    widths = decode.__self__.config.block_out_channels  # type: ignore[attr-defined]
    title = f"svd-vae, widths {widths}, 4 frames of {8 * size}x{8 * size}, float32"
    return f"{title}\n\n{tabulate(rows, headers=headers, disable_numparse=True)}\n"


def _in_float64(decode: Any, args: Sequence[torch.Tensor], kwargs: dict[str, Any]) -> torch.Tensor:
    exact = copy.deepcopy(decode.__self__)
    torch.nn.Module.to(exact, torch.float64)
    [frames] = exact.decode(*(value.double() for value in args), **kwargs)
    return frames


def _seam(size: int) -> str:
    """A decode of one image in tiles, its difference from the whole in units of the mean pixel."""
    decode, args, kwargs = catalogue.small("sd-vae", frames=1, height=size, width=size, batch=1, dtype=torch.float64)
    graph_module = normalize(capture(decode, args, kwargs).graph_module)
    difference, edges = seam(graph_module, args, TILES)
    border = torch.cat([difference[0], difference[-1], difference[:, 0], difference[:, -1]])
    lines = torch.cat([difference[edges].flatten(), difference[:, edges].flatten()])
    rows = [[name, f"{each.max():.1e}"] for name, each in (("all", difference), ("border", border), ("edges", lines))]
    title = f"sd-vae in small, one image of {8 * size}x{8 * size}, float64, {TILES} x {TILES} tiles"
    return f"{title}\n\n{tabulate(rows, headers=['pixels', 'largest difference'], disable_numparse=True)}\n"


def seam(graph_module: fx.GraphModule, args: Sequence[torch.Tensor], tiles: int) -> tuple[torch.Tensor, Sequence[int]]:
    """How far each pixel of an image (1, C, H, H) in ``tiles`` x ``tiles`` is from the whole, in units of the mean one.

    With the rows, and columns, on both sides of where tiles meet.
    """
    [image], [reference] = tiled(graph_module, tiles)(*args), graph_module(*args)
    starts = range(0, reference.shape[-1], reference.shape[-1] // tiles)[1:]
    difference = (image - reference).abs().amax((0, 1)) / reference.abs().mean()
    return difference, [at + side for at in starts for side in (-1, 0)]


def tiled(graph_module: fx.GraphModule, slices: int, dims: Sequence[int] = (2, 3)) -> fx.GraphModule:
    """The graph with all that can be cut along the first of ``dims`` in loops, and their bodies along the others."""
    program = Program(split_norms(graph_module, 0))
    slicer, groups, end = Slicer(program), [], -1
    for run in find_runs(program, range(len(program))):
        seed = run.slices[run.start]
        if run.start <= end or seed.dim != dims[0] or seed.extent != seed.size or run.steps < slices:
            continue
        candidate = whole(program, run)
        if candidate is None:
            continue
        groups.append(Group(candidate, lengths_of(run.extent, slices)))
        end = run.end
        if dims[1:]:
            loop = slicer.loop(groups[-1]).module
            loop.bodies.update({name: tiled(body, slices, dims[1:]) for name, body in loop.graphs().items()})
    return slicer.rewrite(groups)


if __name__ == "__main__":
    main()
