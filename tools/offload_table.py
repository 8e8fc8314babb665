"""Prints what published models hold within budgets below their weights, and what a call reads from disk for it.

Run with `make table-offload`, or `python -m fxstream.tools.offload_table NAME ...` for some of them; nothing is
computed and no weights are needed. Where a budget can't be met, the row is that of the lowest reachable. Seconds are
this machine's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate

from fxstream.api import plan
from fxstream.errors import MemoryBudgetError
from fxstream.pipeline.components import modules_of, weight_bytes
from fxstream.pipeline.plan import PipelinePlan
from fxstream.report import Plan
from fxstream.tools import catalogue, pipelines
from fxstream.tools.bench_offload import WAN_14B

GIB = 2**30
HEADERS = ["", "size", "weights GiB", "captured GiB", "budget", "held GiB", "moved GiB a call", "seconds"]


@dataclass(frozen=True)
class Row:
    """A model at a size, within a budget; of a pipeline, all of it."""

    name: str
    budget: str
    size: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16


ROWS = (
    Row("svd-unet", "1GiB"),
    Row("wan-transformer", "0.8GiB"),
    Row("hunyuanvideo-transformer", "2.5GiB"),
    Row(WAN_14B.name, "4GiB", {"frames": 81, "height": 720, "width": 1280}, torch.bfloat16),
    Row("svd-vae", "1GiB"),
    Row("wan-vae", "1GiB"),
    Row("sd-vae", "0.6GiB", {"frames": 1, "height": 2048, "width": 2048}),
    Row("svd", "2GiB"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan published models within budgets below their weights.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="all without")
    names = parser.parse_args().names
    rows = [
        _of_pipeline(row) if row.name in pipelines.PIPELINES else _of_model(row)
        for row in ROWS
        if not names or row.name in names
    ]
    print(tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True))


def _of_model(row: Row) -> list[str]:
    entry = WAN_14B if row.name == WAN_14B.name else catalogue.CATALOGUE[row.name]
    model, args, kwargs = catalogue.build(entry, **row.size, dtype=row.dtype)
    found, seconds = _planned(row, lambda: plan(model, args, kwargs, memory_budget=row.budget, offload="disk"))
    assert isinstance(found, Plan)
    held = found.input_bytes + found.after.weight_bytes + found.peak_bytes
    shape = entry.shape.resized(**row.size)
    size = f"{shape.frames} x {shape.height}x{shape.width}"
    return _row(row, size, found.weight_bytes, found.before.peak_bytes, held, found.moved_bytes, seconds)


def _of_pipeline(row: Row) -> list[str]:
    pipeline, call = pipelines.build(row.name)
    weights = sum(weight_bytes(modules_of(pipeline)).values())
    found, seconds = _planned(row, lambda: plan(pipeline, memory_budget=row.budget, offload="disk", **call))
    assert isinstance(found, PipelinePlan)
    print(found, file=sys.stderr)
    captured = max(stage.plan.before.peak_bytes for stage in found.stages if stage.plan is not None)
    moved = sum(stage.plan.moved_bytes * (stage.calls or 1) for stage in found.stages if stage.plan is not None)
    size = "{num_frames} x {height}x{width}".format(**call)
    return _row(row, size, weights, captured, found.peak_bytes, moved, seconds)


def _planned(row: Row, planned: Callable[[], Any]) -> tuple[Any, float]:
    print(f"planning {row.name} ...", file=sys.stderr, flush=True)
    began = time.perf_counter()
    try:
        found = planned()
    except MemoryBudgetError as error:
        found = error.plan
    return found, time.perf_counter() - began


def _row(row: Row, size: str, weights: int, captured: int, held: int, moved: int, seconds: float) -> list[str]:
    sizes = [f"{each / GIB:.2f}" for each in (weights, captured, held, moved)]
    kind = "whole pipeline" if row.name in pipelines.PIPELINES else str(row.dtype).removeprefix("torch.")
    cells = [f"{row.name}, {kind}", size, *sizes[:2], row.budget, *sizes[2:], f"{seconds:.0f}"]
    print(*cells, sep=" | ", file=sys.stderr, flush=True)
    return cells


if __name__ == "__main__":
    main()
