"""`fxstream models`: the catalogue."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from fxstream.tools.catalogue import CATALOGUE


def run(args: argparse.Namespace) -> int:
    """The command."""
    rows = [
        [
            entry.name,
            entry.class_path.partition(":")[2] + ("" if entry.method == "forward" else f".{entry.method}"),
            f"{entry.pipeline}.{entry.component}",
            f"{entry.shape.frames} x {entry.shape.height} x {entry.shape.width}",
            entry.source,
        ]
        for entry in CATALOGUE.values()
    ]
    print(tabulate(rows, headers=["name", "class", "component of", "frames x pixels", "configuration from"]))
    return 0
