"""The benchmark of torch.compile: compile time, step time and peak memory of a video UNet on the CPU, in several ways.

Each way has a process and an empty compiler's cache of its own. Every round runs each way once, one after the other,
and a way's time is the median over rounds of its ratio to torch.compile alone in the same round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from tabulate import tabulate

import fxstream
from fxstream.tools import catalogue
from fxstream.tools.bench import MIB, processor, relative_l2, unet
from fxstream.tools.measure import measure_peak

BUDGET = 0.5
"""Of the captured graph's peak."""

ALONE = "torch.compile alone"

AGAIN, ENOUGH = "again", "enough"
"""Requests to a way's process."""


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
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    found: dict[str, dict[str, float]] = {}
    for name in WAYS:
        print(name, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            pipes[name], other = context.Pipe()
            context.Process(target=_serve, args=(name, options.quick, other), daemon=True).start()
            found[name] = pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for name, pipe in pipes.items():
            pipe.send(AGAIN)
            seconds[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(ENOUGH)
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(_table(found, seconds))


def _serve(name: str, quick: bool, pipe: Connection) -> None:
    """Compile and measure one way, then time a run for each request."""
    torch.set_grad_enabled(False)
    model, args, kwargs = _model(quick)
    [reference] = model(*args, **kwargs)
    torch.compile(torch.sin)(torch.zeros(2))  # what a compiler does once in a process
    began = time.perf_counter()
    run = WAYS[name](model, BUDGET)
    run(*args, **kwargs)
    first = time.perf_counter() - began
    measured = measure_peak(run, *args, **kwargs)
    [result] = measured.result
    distance = relative_l2(result, reference)
    pipe.send({"first": first, "peak": measured.peak_bytes, "distance": distance, "predicted": _predicted(run)})
    while pipe.recv() == AGAIN:
        began = time.perf_counter()
        run(*args, **kwargs)
        pipe.send(time.perf_counter() - began)


def _predicted(run: Any) -> float:
    plans = getattr(getattr(run, "_orig_mod", run), "plans", ())
    return plans[0].after.peak_bytes if plans else 0


def _model(quick: bool) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if not quick:
        return unet(False)
    return catalogue.small(catalogue.shallow("svd-unet"), frames=4, height=16, width=16, batch=1)


def _table(found: dict[str, dict[str, float]], seconds: dict[str, list[float]]) -> str:
    alone = found[ALONE]
    rows = []
    for name, way in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[ALONE], strict=True))
        rows.append(
            [
                name,
                f"{way['first']:.0f}",
                f"{statistics.median(seconds[name]):.2f}",
                f"{ratio:.2f}",
                f"{way['peak'] / MIB:.2f}",
                f"{way['predicted'] / MIB:.2f}" if way["predicted"] else "",
                f"{way['peak'] / alone['peak']:.0%}",
                f"{way['distance']:.1e}",
            ]
        )
    headers = ["", "first call s", "step s", "over alone", "peak MiB", "predicted MiB", "of alone", "relative L2"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 7))


if __name__ == "__main__":
    main()
