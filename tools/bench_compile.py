"""The benchmark of torch.compile: compile time, step time and peak memory of a video UNet on the CPU, in several ways.

Each way has a process and an empty compiler's cache of its own. Every round runs each way once, one after the other,
and a way's time is the median over rounds of its ratio to torch.compile alone in the same round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate

import fxstream
from fxstream.tools import catalogue
from fxstream.tools.bench import MIB, processor, relative_l2, unet
from fxstream.tools.measure import measure_peak
from fxstream.tools.turns import Turn, take_turns

BUDGET = 0.5
"""Of the captured graph's peak."""

ALONE = "torch.compile alone"


def _backend(model: Callable[..., Any], budget: Any) -> Any:
    return torch.compile(model, backend="fxstream", options={"memory_budget": budget}, fullgraph=True)


COMPILED: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    ALONE: lambda model, budget: torch.compile(model, fullgraph=True),
    'fxstream, compile="inductor"': lambda model, budget: fxstream.optimize(model, budget, compile="inductor"),
    "torch.compile of fxstream": lambda model, budget: torch.compile(fxstream.optimize(model, budget), fullgraph=True),
    'torch.compile, backend="fxstream"': _backend,
}
"""The ways to compile a model, or a method of one, within a budget."""

WAYS: dict[str, Callable[[Callable[..., Any], Any], Any]] = {
    "eager": lambda model, budget: model,
    "fxstream": lambda model, budget: fxstream.optimize(model, budget),
    **COMPILED,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench_compile", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each way (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a small model, to see that all of it works")
    options = parser.parse_args()
    turns = take_turns(partial(_prepare, options.quick), list(WAYS), options.rounds)
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(_table(turns))


def _prepare(quick: bool, name: str) -> tuple[Callable[[], Any], dict[str, float]]:
    """One way, compiled with an empty cache and measured."""
    torch.set_grad_enabled(False)
    model, args, kwargs = _model(quick)
    [reference] = model(*args, **kwargs)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch.compile(torch.sin)(torch.zeros(2))  # what a compiler does once in a process
        began = time.perf_counter()
        run = WAYS[name](model, BUDGET)
        run(*args, **kwargs)
        first = time.perf_counter() - began
    measured = measure_peak(run, *args, **kwargs)
    [result] = measured.result
    facts = {"first": first, "peak": measured.peak_bytes, "distance": relative_l2(result, reference)}
    return partial(run, *args, **kwargs), facts | {"predicted": _predicted(run)}


def _predicted(run: Any) -> float:
    plans = getattr(getattr(run, "_orig_mod", run), "plans", ())
    return plans[0].after.peak_bytes if plans else 0


def _model(quick: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if not quick:
        return unet(False)
    return catalogue.small(catalogue.shallow("svd-unet"), frames=4, height=16, width=16, batch=1)


def _table(turns: dict[str, Turn]) -> str:
    alone = turns[ALONE]
    rows = []
    for name, turn in turns.items():
        way = turn.facts
        rows.append(
            [
                name,
                f"{way['first']:.0f}",
                f"{turn.median:.2f}",
                f"{turn.over(alone):.2f}",
                f"{way['peak'] / MIB:.2f}",
                f"{way['predicted'] / MIB:.2f}" if way["predicted"] else "",
                f"{way['peak'] / alone.facts['peak']:.0%}",
                f"{way['distance']:.1e}",
            ]
        )
    headers = ["", "first call s", "step s", "over alone", "peak MiB", "predicted MiB", "of alone", "relative L2"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 7))


if __name__ == "__main__":
    main()
