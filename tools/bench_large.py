"""The decode that does not fit: a video decoder at full width, in float32, in less memory than its activations take.

A child process limits its address space, as a machine of that size would, and decodes; another tries the same without
streaming, a third within a budget far below, its activations on disk: that one ends itself where its anonymous memory
passes the budget by a GiB, which Python and libraries take. Each prints its time and the most memory that it had in
use, with weights and libraries, or how it failed: a trace of all allocations would itself not fit beside a decode of
this size. It takes many minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxstream
from fxstream.budget import Budget
from fxstream.tools import catalogue
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import WatchedMemory

GIB = 2**30
WAYS = ("eager", "streamed", "recomputed", "disk")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench_large", description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=24.0, help="address space in GiB (default: 24)")
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--height", type=int, default=576)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--budget", default="2GiB", help="of the way with activations on disk (default: 2GiB)")
    parser.add_argument("--folder", type=Path, help="where those are, and results (default: a temporary folder)")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="all without")
    parser.add_argument("--way", choices=WAYS, help="run one way, in this process")
    options = parser.parse_args()
    if options.way:
        _run(options)
        return
    rows, found = [], dict[str, torch.Tensor]()
    with tempfile.TemporaryDirectory(prefix="fxstream-bench-", dir=options.folder) as folder:
        for way in options.ways:
            command = [sys.executable, "-m", "fxstream.tools.bench_large", *sys.argv[1:], "--folder", folder]
            done = subprocess.run([*command, "--way", way], capture_output=True, text=True, check=False)
            last = (done.stdout.strip() or done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
            rows.append([way, *(last.split("\t") if done.returncode == 0 else ["", "", "", last[:80]])])
            print(f"{way}: {last}", file=sys.stderr, flush=True)
            if done.returncode == 0:
                found[way] = torch.load(Path(folder) / f"{way}.pt")
    shape = f"{options.frames} frames of {options.height}x{options.width}, float32, {options.memory:g} GiB"
    print(f"svd-vae, {shape} of address space, {os.cpu_count()} cores, torch {torch.__version__}\n")
    headers = ["", "planned GiB", "anonymous GiB", "resident GiB", "seconds", "result"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    for way, frames in list(found.items())[1:]:
        first = next(iter(found))
        print(f"Relative L2 of {way} to {first}: {relative_l2(frames, found[first]):.1e}")


def _run(options: argparse.Namespace) -> None:
    budget = Budget.parse(options.budget).total_bytes
    on_disk = options.way == "disk"
    if not on_disk:
        limit = int(options.memory * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    size = {"frames": options.frames, "height": options.height, "width": options.width}
    decode: Any
    decode, args, kwargs = catalogue.build("svd-vae", **size, dtype=torch.float32, fake=False)
    memory = WatchedMemory((budget or 0) / GIB + 1 if on_disk else options.memory)
    planned = "-"
    if on_disk:
        decode = fxstream.optimize(decode, options.budget, args, kwargs, offload=f"disk:{options.folder}")
        print(decode.plans[0], file=sys.stderr)
    elif options.way != "eager":
        decode = fxstream.optimize(decode, "min", args, kwargs, allow_recompute=options.way == "recomputed")
    if options.way != "eager":
        made = decode.plans[0]
        planned = f"{(made.peak_bytes + made.after.weight_bytes + made.input_bytes) / GIB:.2f}"
    memory.start()
    began = time.perf_counter()
    [frames] = decode(*args, **kwargs)
    seconds = time.perf_counter() - began
    torch.save(frames.clone(), options.folder / f"{options.way}.pt")
    told = f"frames of {tuple(frames.shape)}, {'finite' if frames.isfinite().all() else 'not finite'}"
    print(f"{planned}\t{memory.anonymous:.2f}\t{memory.resident:.2f}\t{seconds:.0f}\t{told}")


if __name__ == "__main__":
    main()
