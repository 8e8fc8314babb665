"""Kept: what was measured on a machine, in a file of the user's cache folder, so that it is measured once.

One file for each machine, as kernels see it: the device's name, its instruction set and torch's version. It has a
measurement a line, and lines are only ever added, each block of them by one write: several processes may do so at once,
and a line that was cut short is passed over.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path

import torch

WAY = 1
"""The way of measuring, of which each has files of its own: raised where what is measured, or how, changes."""

Trace = tuple[int, ...]
"""Bytes of each allocation of a call, and of each release as a negative number, in their order."""


def folder() -> Path:
    """Where measurements are kept: ``$FXSTREAM_CACHE_DIR``, else ``fxstream`` in the user's cache folder."""
    named = os.environ.get("FXSTREAM_CACHE_DIR")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxstream"


@cache
def is_here(device: str) -> bool:
    """Whether calls can be measured on a device of that type."""
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


@cache
def machine_name(device: str) -> str:
    """A device as its kernels see it: its model, what instructions they use, and torch's version."""
    if not is_here(device):
        name = (
            "a CUDA card that is not here, of capability 8.0 or later" if device == "cuda" else f"some {device} device"
        )
        return f"{name}, torch {torch.__version__.partition('+')[0]}"
    if device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"{torch.cuda.get_device_name()}, {capability}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "all"
    amx = " AMX" if torch.cpu._is_amx_tile_supported() else ""
    isa = f"{torch.backends.cpu.get_cpu_capability()}{amx}, oneDNN {onednn}"
    return f"{_processor()}, {isa}, torch {torch.__version__}"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else os.uname().machine


def slug(name: str) -> str:
    """A machine's name as one of a file."""
    return re.sub(r"[^\w.+-]+", "-", name)


class Kept:
    """Traces of calls by their keys, of one machine; None where a call can't be run."""

    def __init__(self, device: str) -> None:
        self.name = machine_name(device)
        self.path = folder() / "workspaces" / f"{slug(self.name)}.{WAY}.jsonl"
        self.traces: dict[str, Trace | None] = {}
        self._new: list[str] = []
        self._read = 0
        self.refresh()

    def refresh(self) -> None:
        """Take in what was added to the file since it was last read, by whichever process."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except OSError:
            return
        lines, newline, _ = text.rpartition(b"\n")
        self._read += len(lines) + len(newline)
        for line in lines.splitlines():
            try:
                key, trace = json.loads(line)
            except ValueError:
                continue
            self.traces[key] = None if trace is None else tuple(trace)

    def add(self, key: str, trace: Trace | None) -> None:
        """Keep a measurement, in memory until the next ``save``."""
        self.traces[key] = trace
        self._new.append(json.dumps([key, trace], separators=(",", ":")))

    def save(self) -> None:
        """Add what is new to the file. Without a folder that can be written, it is kept by this process alone."""
        text = "".join(f"{line}\n" for line in self._new).encode()
        self._new.clear()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError:
            return
        try:
            os.write(file, text)
        finally:
            os.close(file)


@cache
def kept(device: str, folder: Path) -> Kept:
    """What is kept in a folder of this machine's device of that type."""
    return Kept(device)
