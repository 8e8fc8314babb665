"""The comparison of Step Rehash's cuts, predictors and schedules, and DeepCache's, on the demo's trained model.

Every way makes the same clips from the same seeds; a way's distance is that of its clips to those of all full steps.
Ways take turns at each batch of seeds, and a way's time is the median over batches of its ratio to no cache in the same
batch. Peaks come from runs of their own.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fxstream
from fxstream import StepRehash
from fxstream.passes.graph.flops import FORMULAS
from fxstream.passes.graph.liveness import storages_of
from fxstream.tools import catalogue
from fxstream.tools.bench import MIB, processor, relative_l2
from fxstream.tools.generation import generate, load, noise_schedule
from fxstream.tools.measure import measure_peak
from fxstream.tools.turns import median_ratio

GIGA = 1e9
BATCH = 4
"""Seeds that are made into clips together."""

EVERY = (2, 4)
"""Intervals: of 25 steps 13 and 7 are full."""


@dataclass
class Way:
    """One way to run a generation. ``group`` is what ways of the same number of full steps have in common."""

    name: str
    model: Callable[..., Any]
    group: str = ""
    flops: float = 0.0
    full: int = 0
    held_bytes: int | None = 0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)

    def times_faster(self, than: Way) -> float:
        """The median over rounds."""
        return median_ratio(than.seconds, self.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench_rehash", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=16, help="clips of each way (default: 16)")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50], help="DDIM steps (default: 25 50)")
    parser.add_argument("--plots", type=Path, help="folder for plots")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    model = load()
    print(f"{type(model).__name__}, {options.seeds} seeds, {BATCH} clips at a time, float32\n")
    for steps in options.steps:
        ways = list(_ways(model, steps, options.plots))
        _run(ways, steps, options.seeds)
        print(f"{steps} DDIM steps\n\n{_table(ways)}\n", flush=True)
        if options.plots is not None:
            _plot(ways, options.plots / f"quality-{steps}.png", f"{steps} DDIM steps, {options.seeds} seeds")
    print(f"Held between steps by the structure of SVD's UNet, at the cut below the first skip connection\n\n{_held()}")


def _ways(model: nn.Module, steps: int, plots: Path | None) -> Iterator[Way]:
    cuts = ("paper", "deepcache", "auto")
    _say("calibrating")
    calibration = fxstream.calibrate(lambda unet: generate(unet, range(1000, 1000 + BATCH), steps), model, cuts=cuts)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        calibration.plot(plots / f"similarity-{steps}.png")
    plain = StepRehash(every=1).around(model)
    yield Way("no cache", plain, full=steps)
    yield Way("eager", model, full=steps)
    for every in EVERY:
        full = math.ceil(steps / every)
        group = f"{full} of {steps}"
        yield Way("last output", _LastOutput(plain, every), group, full=full)
        for cut in cuts:
            for predictor in ("reuse", "taylor"):
                rehash = StepRehash(every=every, cut=cut, predictor=predictor)
                yield Way(f"{cut}, {predictor}", rehash.around(model), group, full=full)
        for predictor in ("reuse", "taylor"):
            rehash = StepRehash(calibration=calibration, full_steps=full, cut="auto", predictor=predictor)
            assert rehash.key_steps is not None
            yield Way(f"auto, {predictor}, Algorithm 1", rehash.around(model), group, full=len(rehash.key_steps))
        if _has_deepcache():
            yield Way("DeepCache 0.1.1", DeepCache(model, steps, every), group, full=full)


class _LastOutput:
    """Calls a model at every N-th timestep and gives its last output otherwise."""

    def __init__(self, model: Callable[..., Any], every: int) -> None:
        self.model, self.every = model, every
        self.time, self.step, self.last = -1.0, 0, None

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.step = 0 if float(timestep) > self.time else self.step + 1
        self.time = float(timestep)
        if self.step % self.every == 0:
            self.last = self.model(sample, timestep, *args, **kwargs)
        return self.last


class DeepCache:
    """The DeepCache package around a model, which it patches for the time of a generation."""

    def __init__(self, model: nn.Module, steps: int, every: int) -> None:
        from DeepCache import DeepCacheSDHelper

        scheduler = noise_schedule()
        scheduler.set_timesteps(steps)
        self.pipe = SimpleNamespace(unet=model, scheduler=scheduler)
        self.helper = DeepCacheSDHelper(pipe=self.pipe)
        self.helper.set_params(cache_interval=every, cache_branch_id=0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe.unet(*args, **kwargs)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Within, the model's forward is the package's."""
        self.helper.enable()
        try:
            yield
        finally:
            self.helper.disable()

    def held_bytes(self) -> int:
        """Bytes of the storages that the package holds."""
        return sum(dict(storages_of(pytree.tree_leaves(self.helper.cached_output))).values())


def _has_deepcache() -> bool:
    try:
        import DeepCache  # noqa: F401
    except ImportError:
        _say("DeepCache is not installed: pip install deepcache")
        return False
    return True


def _generate(way: Way, seeds: Sequence[int], steps: int) -> torch.Tensor:
    if not isinstance(way.model, DeepCache):
        return generate(way.model, seeds, steps)
    with way.model.patched():
        clips = generate(way.model, seeds, steps)
        way.held_bytes = way.model.held_bytes()
    return clips


def _run(ways: list[Way], steps: int, seeds: int) -> None:
    for way in ways:  # the first run, which is not timed, also plans
        _say(f"{steps} steps: measuring {way.name} {way.group}")
        way.peak_bytes = measure_peak(_generate, way, range(BATCH), steps).peak_bytes
        way.flops = _flops(way, ways[0], steps)
    for begin in range(0, seeds, BATCH):
        batch = range(begin, min(begin + BATCH, seeds))
        _say(f"{steps} steps: seeds {batch.start} to {batch.stop - 1}")
        reference = None
        for way in ways:
            began = time.perf_counter()
            clips = _generate(way, batch, steps)
            way.seconds.append(time.perf_counter() - began)
            reference = clips if reference is None else reference
            for clip, whole in zip(clips, reference, strict=True):
                error = float((clip - whole).double().square().mean())
                way.psnr.append(10 * math.log10(4 / error) if error > 1e-12 else math.inf)
                way.relative.append(relative_l2(clip, whole))


def _flops(way: Way, plain: Way, steps: int) -> float:
    """FLOPs of one generation of ``BATCH`` clips."""
    if isinstance(way.model, fxstream.RehashedModule):
        (plan,) = way.model.plans
        way.held_bytes = plan.held_bytes if way.group else 0
        return way.full * plan.full_flops + (steps - way.full) * plan.skip_flops
    if not isinstance(way.model, DeepCache):
        way.held_bytes = 0 if not way.group else None
        return plain.flops / steps * way.full
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        _generate(way, range(BATCH), steps)
    return counter.get_total_flops()


def _table(ways: list[Way]) -> str:
    rows = []
    for way in ways:
        rows.append(
            [
                way.name,
                way.full,
                "" if math.inf in way.psnr else f"{statistics.mean(way.psnr):.2f}",
                f"{statistics.mean(way.relative):.4f}",
                f"{statistics.median(way.seconds):.2f}",
                f"{way.times_faster(ways[0]):.2f}",
                f"{way.flops / GIGA:.0f}",
                f"{way.peak_bytes / MIB:.2f}",
                "" if way.held_bytes is None else f"{way.held_bytes / MIB:.2f}",
            ]
        )
    headers = ["", "full steps", "PSNR dB", "relative L2", "seconds", "times faster", "GFLOPs", "peak MiB", "held MiB"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 8))


def _held() -> str:
    """What DeepCache and Step Rehash hold at one cut of an SVD-shaped UNet, after a full step."""
    entry = replace(catalogue.SVD, small={**catalogue.SVD.small, "layers_per_block": 2})
    model, (latents, _, image), kwargs = catalogue.small(entry, frames=8, height=32, width=48)
    module = StepRehash(cut="deepcache").around(model)
    module.prepare(latents, torch.tensor(999.0), image, **kwargs)
    (plan,) = module.plans
    rows = [["Step Rehash, reuse", f"{plan.held_bytes / MIB:.2f}"]]
    if _has_deepcache():
        package = DeepCache(cast("nn.Module", model), 25, 2)
        with package.patched():
            package(latents, package.pipe.scheduler.timesteps[0], image, **kwargs)
            held = package.held_bytes()
        rows.append(["DeepCache 0.1.1", f"{held / MIB:.2f}"])
        rows.append(["share", f"{plan.held_bytes / held:.3f}"])
    return tabulate(
        rows, headers=["", "held MiB"], tablefmt="github", disable_numparse=True, colalign=("left", "right")
    )


def _plot(ways: list[Way], path: Path, title: str) -> None:
    """A panel for each number of full steps, and in it a line a way: its quality, and how much faster it is."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(way.group for way in ways if way.group))
    figure = Figure(figsize=(9, 3.2 * len(groups)), layout="constrained")
    figure.suptitle(title)
    for axes, group in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        members = [way for way in ways if way.group == group][::-1]
        quality = [statistics.mean(way.psnr) for way in members]
        axes.scatter(quality, range(len(members)))
        for row, (way, x) in enumerate(zip(members, quality, strict=True)):
            faster = f"{way.times_faster(ways[0]):.2f}x faster"
            axes.annotate(faster, (x, row), textcoords="offset points", xytext=(7, -3), fontsize=8)
        axes.set_yticks(range(len(members)), [way.name for way in members])
        axes.set(xlabel=f"PSNR to no cache, dB, with {group} steps in full")
        axes.margins(x=0.25, y=0.08)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
