"""Clips made by the demo's trained model: whole, streamed, and with steps skipped."""

from __future__ import annotations

import math
import time
from pathlib import Path

from tabulate import tabulate

import fxstream
from fxstream import StepRehash
from fxstream.budget import format_bytes
from fxstream.tools import quality
from fxstream.tools.clips import write_gif, write_sheet
from fxstream.tools.generation import generate, label_of, load
from fxstream.tools.measure import measure_peak
from fxstream.tools.shapes import MOTIONS, SHAPES

SEEDS = (2, 5, 8, 11)
STEPS = 25
BUDGET = 0.5


def clips(folder: Path, steps: int = STEPS) -> str:
    """Make clips in several ways, write them into a folder, and say in a table what each way took."""
    folder.mkdir(parents=True, exist_ok=True)
    model = load()
    ways = {
        "whole": model,
        f"streamed, {BUDGET}": fxstream.optimize(model, BUDGET),
        f"streamed, {BUDGET}, auto": fxstream.optimize(model, BUDGET, step_rehash=StepRehash(every=2)),
        f"streamed, {BUDGET}, auto, taylor": fxstream.optimize(
            model, BUDGET, step_rehash=StepRehash(every=2, predictor="taylor")
        ),
    }
    rows, sheet, whole = [], [], None
    for name, module in ways.items():
        made = generate(module, SEEDS, steps)
        began = time.perf_counter()
        generate(module, SEEDS, steps)
        seconds = time.perf_counter() - began
        measured = measure_peak(generate, module, SEEDS, 2)
        whole = made if whole is None else whole
        error = float((made - whole).double().square().mean())
        full, skipped = steps, 0
        if isinstance(module, fxstream.RehashedModule):
            stats = module.stats()
            full = round(steps * stats.full_steps / (stats.full_steps + stats.skipped_steps))
            skipped = steps - full
        passed = int(quality.measure(made).passed()["all"].sum())
        rows.append(
            [
                name,
                f"{full} + {skipped}",
                f"{seconds:.2f}",
                format_bytes(measured.peak_bytes),
                f"{10 * math.log10(4 / error):.1f}" if error else "",
                f"{passed} of {len(SEEDS)}",
            ]
        )
        for seed, clip in zip(SEEDS, made, strict=True):
            shape, motion, _ = label_of(seed)
            sheet.append((f"{SHAPES[shape]}, {MOTIONS[motion]}: {name.removeprefix('streamed, ')}", clip))
            write_gif(clip, folder / f"{seed}-{name.replace(', ', '-')}.gif")
    sheet.sort(key=lambda row: row[0].split(":")[0])
    write_sheet(sheet, folder / "sheet.png")
    headers = ["", "full + skipped", "seconds", "measured peak", "PSNR dB", "like the data"]
    count = len(SEEDS)
    return (
        f"{count} clips of a trained model, {steps} DDIM steps with classifier-free guidance, in {folder}/:\n\n"
        + tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 5))
        + "\n\nPSNR is to the whole model's clips. The last column counts clips that lie in the ranges of real ones."
    )
