"""`fxstream machine`: what is known of this machine, and its prices measured."""

from __future__ import annotations

import argparse
import sys

from tabulate import tabulate

from fxstream.tools.errors import UsageError


def run(args: argparse.Namespace) -> int:
    """The command."""
    import torch

    from fxstream.passes.machine.cost import cost_model, kept_prices, save_prices
    from fxstream.passes.machine.kept import folder, is_here, kept, machine_name
    from fxstream.passes.machine.prices import measure_prices

    if not is_here(args.device):
        raise UsageError(f"{args.device} is no device of this machine that can be measured")
    device = torch.device(args.device)
    if args.measure:
        save_prices(args.device, measure_prices(device, lambda what: print(what, file=sys.stderr)))
    table, prices = kept(args.device, folder()), cost_model(device)
    measured = "measured here" if kept_prices(args.device) else "of other machines: --measure measures them here"
    rows = [
        ("machine", machine_name(args.device)),
        ("threads", torch.get_num_threads()),
        ("kept in", folder()),
        ("calls measured", len(table.traces)),
        ("prices", measured),
        ("launch", f"{prices.launch * 1e6:.1f} us"),
        *(_rate(f"memory, to {size >> 20} MiB", rate) for size, rate in prices.rates),
        _rate("memory, beyond", prices.beyond),
        ("products", f"{1e-9 / prices.flop:,.0f} GFLOP/s"),
    ]
    print(tabulate(rows, tablefmt="plain"))
    return 0


def _rate(name: str, seconds: float) -> tuple[str, str]:
    return name, f"{1e-9 / seconds:,.1f} GB/s"
