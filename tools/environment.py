"""`fxstream env`: versions and devices, as a bug report should tell them."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from tabulate import tabulate

from fxstream.budget import format_bytes
from fxstream.tools.bench import processor

PACKAGES = ("fxstream", "torch", "diffusers", "networkx", "transformers", "accelerate", "safetensors", "matplotlib")


def run(args: argparse.Namespace) -> int:
    """The command."""
    print(tabulate(facts(), tablefmt="plain"))
    return 0


def facts() -> list[tuple[str, str]]:
    """What tells of this environment, and what it is here."""
    import torch

    rows = [(name, _version(name)) for name in PACKAGES]
    rows += [
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("processor", f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        ("memory", _memory()),
        ("CPU kernels", torch.backends.cpu.get_cpu_capability()),
        ("CUDA", _cuda()),
    ]
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        rows.append((f"cuda:{number}", f"{device.name}, {format_bytes(device.total_memory)}"))
    return rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    try:
        return format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on every system
        return "unknown"


def _cuda() -> str:
    import torch

    built = f"torch is built for {torch.version.cuda}" if torch.version.cuda else "torch is built without it"
    return f"{built}, {torch.cuda.device_count()} devices"
