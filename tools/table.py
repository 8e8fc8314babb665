"""Prints the README's table: every model of the catalogue at its published size, planned to the lowest reachable.

Run with `make table`, or `python -m fxstream.tools.table NAME ...` for some of them; nothing is computed and no weights
are needed. Plans are for a CUDA card, here or not, unless `--device cpu` is given. Seconds are this machine's. What
recomputing gains is planned for decoders, whose norms' inputs it saves.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tabulate import tabulate

from fxstream.api import plan
from fxstream.tools.catalogue import CATALOGUE, build

FURTHER: list[tuple[str, dict[str, Any]]] = [
    ("svd-vae", {"frames": 25}),
    ("sd-vae", {"frames": 1, "height": 2048, "width": 2048}),
]
"""Sizes beside the published ones."""

HEADERS = [
    *("model", "size", "weights GiB", "captured GiB", "streamed GiB", "launches", "capture s", "planning s"),
    *("with recompute GiB", "more TFLOP"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Plan models of the catalogue to the lowest reachable peak.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="all without")
    parser.add_argument("--device", default="cuda", help="what is planned for (default: %(default)s)")
    options = parser.parse_args()
    names = options.names or CATALOGUE
    sizes = [(name, size) for name, size in [*((name, {}) for name in CATALOGUE), *FURTHER] if name in names]
    rows, machines = zip(*(_row(name, size, options.device) for name, size in sizes), strict=True)
    print(tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True))
    print(f"\nPlanned for {machines[0]}.")


def _row(name: str, size: dict[str, Any], device: str) -> tuple[list[str], str]:
    """A row of the table, and what it was planned for."""
    print(f"planning {name} ...", file=sys.stderr, flush=True)
    model, args, kwargs = build(name, **size, device=device)
    found = plan(model, args, kwargs, memory_budget="min")
    before, after = found.launches
    entry = CATALOGUE[name]
    frames, height, width = (size.get(key, getattr(entry.shape, key)) for key in ("frames", "height", "width"))
    row = [
        name,
        f"{frames} x {height}x{width}",
        *(f"{each / 2**30:.2f}" for each in (found.weight_bytes, found.before.peak_bytes, found.after.peak_bytes)),
        f"{after / before:.1f} x",
        *(f"{found.seconds[step]:.0f}" for step in ("capture", "planning")),
    ]
    if entry.method != "decode":
        return [*row, "", ""], found.machine
    again = plan(model, args, kwargs, memory_budget="min", allow_recompute=True)
    return [*row, f"{again.after.peak_bytes / 2**30:.2f}", f"{again.added_flops / 1e12:.1f}"], found.machine


if __name__ == "__main__":
    main()
