"""The table of torch.compile over the catalogue: what each small model computes and holds when Inductor compiles it.

Where a model can't meet the budget, it is planned for the lowest that it can, and the row says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fxstream
from fxstream.passes.graph.structure import flatten
from fxstream.tools import catalogue
from fxstream.tools.bench import MIB, relative_l2
from fxstream.tools.bench_compile import BUDGET, COMPILED
from fxstream.tools.measure import measure_peak

HEADERS = [
    *("model", "budget", "loops (ragged)", "predicted MiB", "alone, peak MiB"),
    *('compile="inductor"', "around", "backend", "relative L2 of all"),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.compile_table", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names of the catalogue (default: all)")
    parser.add_argument("--budget", type=_budget, default=BUDGET, help="a share, or min (default: %(default)s)")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for cells in _cells(options.models or list(catalogue.CATALOGUE), options.budget):
        print("| " + " | ".join(cells) + " |", flush=True)


def _budget(text: str) -> float | str:
    return text if text == "min" else float(text)


def _planned(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], budget: float | str
) -> tuple[float | str, fxstream.Plan]:
    """A budget that can be met, and the plan for it."""
    try:
        return budget, fxstream.plan(model, args, kwargs, memory_budget=budget)
    except fxstream.MemoryBudgetError:
        return "min", fxstream.plan(model, args, kwargs, memory_budget="min")


def _cells(names: list[str], asked: float | str) -> Iterator[list[str]]:
    yield HEADERS
    yield ["---"] * 2 + ["---:"] * (len(HEADERS) - 2)
    for name in names:
        entry = catalogue.shallow(name)
        batch = 2 if entry.component == "unet" else 1
        model, args, kwargs = catalogue.small(entry, frames=3, height=16, width=24, batch=batch)
        budget, plan = _planned(model, args, kwargs, asked)
        ragged = sum(len(set(group.lengths)) > 1 for group in plan.groups)
        found = [_run(COMPILED[way](model, budget), model, args, kwargs) for way in COMPILED]
        peaks = [f"{peak / MIB:.2f}" for peak, _ in found]
        distance = max(distance for _, distance in found)
        planned = f"{len(plan.groups)} ({ragged})", f"{plan.after.peak_bytes / MIB:.2f}"
        yield [name, str(budget), *planned, *peaks, f"{distance:.1e}"]


def _run(
    compiled: Callable[..., Any], model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, float]:
    """The peak of a run after the first, in bytes, and the distance of what it gives from what eager mode does."""
    torch._dynamo.reset()
    compiled(*args, **kwargs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        measured = measure_peak(compiled, *args, **kwargs)
    found, expected = (flatten(result)[0] for result in (measured.result, model(*args, **kwargs)))
    return measured.peak_bytes, max(relative_l2(*pair) for pair in zip(found, expected, strict=True))


if __name__ == "__main__":
    main()
