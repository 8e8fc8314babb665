"""The decode that does not fit: a video decoder at full width, in float32, in less memory than its activations take.

A child process limits its address space, as a machine of that size would, and decodes; another tries the same without
streaming. Each prints its time and the most memory that it had in use, with weights and libraries, or how it failed: a
trace of all allocations would itself not fit beside a decode of this size. It takes many minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import torch
from tabulate import tabulate

import fxstream
from fxstream.tools import catalogue

GIB = 2**30
WAYS = ("eager", "streamed", "recomputed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench_large", description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=24.0, help="address space in GiB (default: 24)")
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--height", type=int, default=576)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--way", choices=WAYS, help="run one way, in this process")
    options = parser.parse_args()
    if options.way:
        _run(options)
        return
    rows = []
    for way in WAYS:
        command = [sys.executable, "-m", "fxstream.tools.bench_large", *sys.argv[1:], "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (done.stdout.strip() or done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        rows.append([way, *(last.split("\t") if done.returncode == 0 else ["", "", "", last[:80]])])
        print(f"{way}: {last}", file=sys.stderr, flush=True)
    shape = f"{options.frames} frames of {options.height}x{options.width}, float32, {options.memory:g} GiB"
    print(f"svd-vae, {shape} of address space, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print(tabulate(rows, headers=["", "planned GiB", "resident GiB", "seconds", "result"], disable_numparse=True))


def _run(options: argparse.Namespace) -> None:
    limit = int(options.memory * GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    size = {"frames": options.frames, "height": options.height, "width": options.width}
    decode, args, kwargs = catalogue.build("svd-vae", **size, dtype=torch.float32, fake=False)
    planned = "-"
    if options.way != "eager":
        decode = fxstream.optimize(decode, "min", args, kwargs, allow_recompute=options.way == "recomputed")
        planned = f"{decode.plans[0].after.peak_bytes / GIB:.2f}"
    began = time.perf_counter()
    [frames] = decode(*args, **kwargs)
    seconds = time.perf_counter() - began
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = f"frames of {tuple(frames.shape)}, {'finite' if frames.isfinite().all() else 'not finite'}"
    print(f"{planned}\t{resident / GIB:.2f}\t{seconds:.0f}\t{told}")


if __name__ == "__main__":
    main()
