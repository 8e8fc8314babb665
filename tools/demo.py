"""The demo: a video UNet run whole and run within two budgets, what fxstream predicted, and what the allocator saw.

The UNet has the structure of Stable Video Diffusion's, few channels and random weights, and runs for real in fp32. Then
a small trained model makes clips whole, streamed, and with steps skipped; they are written as pictures.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch
from tabulate import tabulate

import fxstream
from fxstream.budget import format_bytes
from fxstream.report import Plan, PlannedGroup
from fxstream.tools.bench import relative_l2
from fxstream.tools.catalogue import small
from fxstream.tools.chart import memory_chart
from fxstream.tools.demo_clips import clips
from fxstream.tools.measure import measure_peak

BUDGETS = (0.5, "min")
CLIPS = Path("build/demo")
"""Folder of the clips."""

SHOWN_GROUPS = 6


def main() -> None:
    torch.set_grad_enabled(False)
    model, args, kwargs = small("svd-unet", frames=8, height=32, width=48)
    print(f"{type(model).__name__}: 2 x 8 frames, latents of 32 x 48, float32, on the CPU\n")
    eager = measure_peak(model, *args, **kwargs)
    rows = [["eager", "", format_bytes(eager.peak_bytes), ""]]
    plans = []
    for budget in BUDGETS:
        print(f"fxstream.optimize(unet, {budget!r}) ...", end=" ", flush=True)
        began = time.perf_counter()
        streamed = fxstream.optimize(model, budget, args, kwargs)
        print(f"{time.perf_counter() - began:.1f} s")
        (plan,) = streamed.plans
        measured = measure_peak(streamed, *args, **kwargs)
        peaks = [format_bytes(plan.after.peak_bytes), format_bytes(measured.peak_bytes)]
        rows.append([f"fxstream, {budget!r}", *peaks, f"{relative_l2(measured.result[0], eager.result[0]):.1e}"])
        plans.append(plan)
    print("\n" + tabulate(rows, headers=["", "predicted peak", "measured peak", "relative L2"], stralign="right"))
    print("\nThe peak is of what a call allocates over its weights and inputs; relative L2 is to eager.")
    show(plans[0], BUDGETS[0])
    print(f"\n{clips(CLIPS)}")


def show(plan: Plan, budget: str | float) -> None:
    """A plan, in short: memory before and after, the groups that save most, and the code of the first of these."""
    print(f"\nThe plan for {budget!r}\n\n{plan.summary()}")
    groups = sorted(plan.groups, key=_saved, reverse=True)
    shown = [
        [f"{g.first} .. {g.last}", g.axis, g.slices, *map(format_bytes, (g.bytes_before, g.bytes_after))]
        for g in groups
    ]
    print(f"\n{len(groups)} groups; those that save most:")
    print(tabulate(shown[:SHOWN_GROUPS], headers=["nodes", "axis", "slices", "before", "after"]))
    if groups:
        print(f"\nThe body of {groups[0].first} .. {groups[0].last} of {groups[0].module_path}, run once a slice:")
        print(f"\n{_code(groups[0])}")
    for name, profile in (("before", plan.before), ("after", plan.after)):
        print(f"\nActivations along the schedule {name}:")
        print(memory_chart(profile.live_bytes, height=9, top_bytes=plan.before.peak_bytes))


def _saved(group: PlannedGroup) -> int:
    return group.bytes_before - group.bytes_after


def _code(group: PlannedGroup) -> str:
    """The body without the lines' tails that free what was used, weights by their names within the module."""
    within = "p_model_" + group.module_path.replace(".", "_") + "_"
    return re.sub(r";  .* = None", "", group.code).replace(within, "").replace("torch.ops.", "").strip()


if __name__ == "__main__":
    main()
