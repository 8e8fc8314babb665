"""Prints the README's table: every model of the catalogue at its published size, planned to the lowest reachable.

Run with `make table`; nothing is computed and no weights are needed. Seconds are this machine's.
"""

from __future__ import annotations

import sys

from tabulate import tabulate

from fxstream.api import plan
from fxstream.tools.catalogue import CATALOGUE, build


def main() -> None:
    rows = []
    for name in CATALOGUE:
        print(f"planning {name} ...", file=sys.stderr, flush=True)
        model, args, kwargs = build(name)
        found = plan(model, args, kwargs, memory_budget="min")
        rows.append(
            [
                name,
                *(
                    f"{size / 2**30:.2f}"
                    for size in (found.weight_bytes, found.before.peak_bytes, found.after.peak_bytes)
                ),
                len(found.groups),
                *(f"{found.seconds[step]:.0f}" for step in ("capture", "planning")),
            ]
        )
    headers = ["model", "weights GiB", "captured GiB", "streamed GiB", "loops", "capture s", "planning s"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
